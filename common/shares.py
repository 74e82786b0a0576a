"""Shares of counts, exact for ratios as they are written: 0.7 of 90 is 63, where binary fractions give 62."""

from collections.abc import Iterable
from fractions import Fraction


def part_of(count: int, ratio: float) -> int:
    """The integer part of `ratio` of `count`."""
    return parts_of([count], ratio)[0]


def parts_of(counts: Iterable[int], ratio: float) -> list[int]:
    """The integer parts of `ratio` of each count."""
    share = Fraction(str(float(ratio)))
    return [count * share.numerator // share.denominator for count in counts]
