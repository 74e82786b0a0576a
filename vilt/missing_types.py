"""Missing types: numbers that encode which of M named modalities a sample lacks, and their names.

Each modality has a binary digit, 1 if it is missing; the last modality has the lowest digit. With image and text: 0
complete, 1 text missing, 2 image missing. A sample always has at least one modality.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np

COMPLETE = 0
AVAILABLE = "_available"
"""Suffix in the names of the shares of samples that have a modality."""
JOIN = "+"
BOTH, ANY, SOME = "both", "any", "some"
"""Missing types of patterns whose samples lose different things: one of two modalities, in given shares; one of three
or more, equally often; a non-empty proper subset of three or more, equally often."""


def missing_types(modalities: Iterable[str]) -> tuple[str, ...]:
    """The missing types that a pattern may have, other than several named modalities such as `text+audio`."""
    names = list(modalities)
    return (*reversed(names), *((BOTH,) if len(names) == 2 else (ANY, SOME)))


def pattern_type(modalities: Iterable[str], name: str) -> str | None:
    """`name` as patterns spell it: one of `missing_types`, or several modalities in order (`text+audio`). Else None."""
    names = list(modalities)
    if name in missing_types(names):
        return name
    lost = set(name.split(JOIN))
    return JOIN.join(each for each in names if each in lost) if lost < set(names) and len(lost) > 1 else None


def type_names(modalities: Iterable[str]) -> tuple[str, ...]:
    """Names of a sample's missing types, 0 to 2^M - 2."""
    names = list(modalities)
    lacking = ([name for name in names if is_missing(names, name, code)] for code in range(1, 2 ** len(names) - 1))
    return ("complete", *(f"{', '.join(missing)} missing" for missing in lacking))


def code_of(modalities: Iterable[str], modality: str) -> int:
    """The missing type of samples that lack only `modality`, which may name several as `text+audio`."""
    names = list(modalities)
    return int(sum(2 ** (len(names) - 1 - names.index(name)) for name in modality.split(JOIN)))


def is_missing(modalities: Iterable[str], modality: str, code: Any) -> Any:
    """Whether samples of missing type `code` (a number or an array) lack `modality`."""
    return code & code_of(modalities, modality) != 0


def with_natural(modalities: Iterable[str], natural: np.ndarray | int, table: np.ndarray) -> np.ndarray:
    """Missing types (N,) after applying a missing table to samples with naturally missing modalities `natural`.

    A sample that would be left with nothing keeps what it has.
    """
    both = natural | table
    return np.where(both == 2 ** len([*modalities]) - 1, natural, both).astype(np.int8)


def available_shares(modalities: Iterable[str], missing_type: str, ratio: float, both_ratio: float) -> dict[str, float]:
    """Share of samples that have each modality, if a share `ratio` of them loses what `missing_type` says."""
    names = list(modalities)
    if missing_type == BOTH:
        lost = dict(zip(names, (both_ratio, 1 - both_ratio), strict=True))
    else:
        share = {ANY: 1 / len(names), SOME: 1 / 2}  # each modality is in half of the subsets
        lost = {name: share.get(missing_type, float(name in missing_type.split(JOIN))) for name in names}
    return {name: 1 - ratio * lost[name] for name in names}
