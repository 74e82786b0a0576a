"""Shares of counts, exact for decimal ratios: 0.7 of 90 is 63, whereas binary floating point gives 62."""

from collections.abc import Iterable
from fractions import Fraction


def part_of(count: int, ratio: float) -> int:
    """The integer part of `ratio` times `count`."""
    return parts_of([count], ratio)[0]


def parts_of(counts: Iterable[int], ratio: float) -> list[int]:
    """The integer part of `ratio` times each count."""
    share = Fraction(str(float(ratio)))
    return [count * share.numerator // share.denominator for count in counts]
