"""Words of other libraries' errors, and of values that are not what was expected, to put into our errors."""

import difflib
import re
import reprlib
from collections.abc import Sequence

_SHORT = reprlib.Repr()
_SHORT.maxlevel = 2
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 120
LONGEST_LINE = 500
"""Of words that are not ours, in characters: some are, or have in them, what was found, of any length."""


def quoted(value: object) -> str:
    """`value` as Python writes it, a number of NumPy's as a number; what is long or nested deeply is shortened."""
    if getattr(value, "shape", None) == () and not isinstance(value, str | bytes):
        return str(value)
    return _SHORT.repr(value)


def listed(names: Sequence[object]) -> str:
    """Names as Python writes them, with commas between them, of many the first ten; `nothing` where there are none."""
    return ", ".join([*map(quoted, names[:10]), *(["…"] if len(names) > 10 else [])]) or "nothing"


def near(word: object, known: Sequence[str]) -> str:
    """`; did you mean NAME?` with the name of `known` that begins with `word`, or is most like it, if there is one."""
    like = str(word).casefold()
    begun = [name for name in known if len(like) > 1 and name.casefold().startswith(like)]
    found = begun or difflib.get_close_matches(like, known, n=1)
    return f"; did you mean {found[0]}?" if found else ""


def first_line(error: BaseException) -> str:
    """The line of `error`'s text that says what is wrong, cut where it is long; its type where the text says nothing.

    Of torch's refusal of a pickle: what it refused, not the advice to read the file without care.
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
    """`text`, of LONGEST_LINE characters at most."""
    return text if len(text) <= LONGEST_LINE else f"{text[:LONGEST_LINE]}…"


def printable(text: str) -> str:
    """`text` on one line, without control characters, so that a hostile or broken name cannot garble a list."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
