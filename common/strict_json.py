"""JSON files, written atomically and read strictly."""

import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.errors import DataError
from common.files import atomic_path
from common.messages import first_line, quoted


def parse_json(data: bytes) -> Any:
    """The value of a JSON text in UTF-8 (a byte order mark is allowed).

    Raises ValueError for anything else, and for an object that repeats a key: Python would silently keep the last.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = dict(pairs)
        if len(keys) < len(pairs):
            counts = Counter(name for name, _ in pairs)
            repeated = next(name for name in counts if counts[name] > 1)
            raise ValueError(f"the key {quoted(repeated)} is repeated")
        return keys

    try:
        text = data.decode("utf-8-sig")
        value = json.loads(text, object_pairs_hook=unique)
        if "\\ud" in text.lower():  # perhaps a lone surrogate, which JSON can spell but UTF-8 cannot
            json.dumps(value, ensure_ascii=False, default=str).encode()
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise ValueError(f"{error.msg} ({line}column {error.colno})") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return value


def kind_of(value: object) -> str:
    """JSON's name for the type of `value`, for messages."""
    names: dict[type, str] = {dict: "an object", list: "a list", str: "a string", type(None): "null"}
    return names.get(type(value)) or json.dumps(value, default=repr)[:120]


def write_json(path: Path, content: Any) -> None:
    """Writes `content` atomically, indented. Numbers that are not finite become null."""
    with atomic_path(path) as temporary:
        text = json.dumps(_finite(content), indent=2, default=str, allow_nan=False)
        temporary.write_text(text + "\n", "utf-8")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises DataError, which names the file, if it cannot be read as one."""
    try:
        content = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not readable as JSON: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected a JSON object, found {kind_of(content)}")
    return content
