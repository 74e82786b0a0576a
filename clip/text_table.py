"""Tables of words and numbers for the terminal."""

from collections.abc import Sequence

ALIGNED = {"<": str.ljust, ">": str.rjust}


def align(rows: Sequence[Sequence[str]], sides: str, gap: int) -> list[str]:
    """A line per row, with the columns aligned to their `sides` (`<` or `>`) and `gap` spaces between them.

    A row without columns is an empty line.
    """
    widths = [max(len(row[place]) for row in rows if row) for place in range(len(sides))]
    lines = []
    for row in rows:
        cells = zip(row, sides, widths, strict=True) if row else ()
        lines.append((" " * gap).join(ALIGNED[side](text, width) for text, side, width in cells).rstrip())
    return lines


def ruled_table(head: Sequence[str], rows: Sequence[Sequence[str]], sides: str) -> str:
    """Columns under their names, with a line between, indented."""
    first, *rest = align([head, *rows], sides, gap=3)
    return "\n".join(f"  {line}" for line in (first, "─" * max(map(len, (first, *rest))), *rest))


def per_cent(share: float) -> str:
    """A share as `70 %`."""
    return f"{round(100 * share, 6):g} %"


def pattern_text(missing_type: str, ratio: float, both_ratio: float) -> str:
    """A pattern as `70 % both`, with both_ratio where that matters and is not a half."""
    share = f" {both_ratio:g}" if missing_type == "both" and both_ratio != 0.5 else ""
    return f"{per_cent(ratio)} {missing_type}{share}"
