"""JSON that others wrote, read without guessing."""

import json
from collections import Counter
from typing import Any

from common.messages import quoted


def parse_json(data: bytes) -> Any:
    """The value of a JSON text in UTF-8 (a byte order mark is allowed).

    Raises ValueError for anything else, also for an object that repeats a key: Python would silently keep the last.
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
        if "\\ud" in text.lower():  # perhaps half of a surrogate pair, which JSON can spell and UTF-8 cannot
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise ValueError(f"{error.msg} ({line}column {error.colno})") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return value


def kind_of(value: object) -> str:
    """JSON's name for the type of `value`, for messages."""
    names: dict[type, str] = {dict: "an object", list: "a list", str: "a string", type(None): "null"}
    return names.get(type(value)) or json.dumps(value)[:120]
