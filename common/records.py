"""Restores dataclasses of plain values from the dicts of `dataclasses.asdict`, which may have passed through JSON."""

from dataclasses import MISSING, fields
from typing import TypeVar, get_origin, get_type_hints

from common.messages import listed, quoted

T = TypeVar("T")


def record_of(kind: type[T], values: object) -> T:
    """A `kind` made of `values`, keyed by field; fields with defaults may be left out.

    Raises:
        ValueError: a field is missing or unknown, or its value has the wrong type; the message names the field.
    """
    hints = get_type_hints(kind)
    types = {
        name: origin if (origin := get_origin(hint)) in (tuple, list, dict) else hint for name, hint in hints.items()
    }
    needed = {
        field.name
        for field in fields(kind)  # type: ignore[arg-type]
        if field.default is MISSING and field.default_factory is MISSING
    }
    if not isinstance(values, dict):
        raise ValueError(f"expected a {kind.__name__}, found {quoted(values)}")
    missing, unknown = sorted(needed - values.keys()), sorted(map(str, values.keys() - types.keys()))
    if missing or unknown:
        raise ValueError(f"{kind.__name__}: missing: {listed(missing)}; unknown: {listed(unknown)}")
    values = {
        name: tuple(value) if types[name] is tuple and isinstance(value, list) else value
        for name, value in values.items()
    }
    for name, value in values.items():
        if not isinstance(value, types[name]):
            expected = getattr(types[name], "__name__", types[name])
            raise ValueError(f"{name}: expected {expected}, found {quoted(value)}")
    return kind(**values)
