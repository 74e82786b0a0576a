"""Pieces of error messages: unexpected values, and the errors of other libraries, fit to quote."""

import difflib
import re
import reprlib
from collections.abc import Sequence

_SHORT = reprlib.Repr()
_SHORT.maxlevel = 2
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 120
LONGEST_LINE = 500
"""Characters of a quoted message that are shown: other libraries may quote input of any length."""


def quoted(value: object) -> str:
    """The repr of `value`, shortened if it is long or deeply nested; a NumPy scalar as a plain number."""
    if getattr(value, "shape", None) == () and not isinstance(value, str | bytes):
        return str(value)
    return _SHORT.repr(value)


def listed(names: Sequence[object]) -> str:
    """The reprs of `names`, separated by commas; the first ten if there are more, `nothing` if there are none."""
    return ", ".join([*map(quoted, names[:10]), *(["…"] if len(names) > 10 else [])]) or "nothing"


def suggestion(word: object, known: Sequence[str]) -> str:
    """`; did you mean NAME?` with the name in `known` that begins with `word` or is closest to it, if there is one."""
    like = str(word).casefold()
    begun = [name for name in known if len(like) > 1 and name.casefold().startswith(like)]
    found = begun or difflib.get_close_matches(like, known, n=1)
    return f"; did you mean {found[0]}?" if found else ""


def first_line(error: BaseException) -> str:
    """The line of `error`'s message that says what is wrong, cut if long; the error's type if the message is empty.

    If torch refuses a pickle, this is what it refused, without the advice to load the file unsafely.
    """
    text = str(error)
    if text.startswith("Weights only load failed"):
        if mentioned := re.search(r"GLOBAL (\S+)", text):
            return f"it mentions {mentioned[1]}, which might run code"
        text = text.rpartition("WeightsUnpickler error:")[2].partition("Check the documentation")[0]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines or isinstance(error, KeyError):
        lines = [" ".join([type(error).__name__, *lines[:1]])]
    return cut(lines[0])


def cut(text: str) -> str:
    """`text`, cut to LONGEST_LINE characters."""
    return text if len(text) <= LONGEST_LINE else f"{text[:LONGEST_LINE]}…"


def printable(text: str) -> str:
    """`text` on one line, with control characters escaped, so that a hostile or broken name cannot garble a list."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
