"""Missing patterns as used by runs, comparisons and the report."""

from typing import Any, NamedTuple

from common.messages import quoted
from common.text import per_cent
from vilt.datasets.specs import DatasetSpec
from vilt.missing_types import BOTH, pattern_type


class Pattern(NamedTuple):
    """The missing pattern of a training or an evaluation, without the seed of its table."""

    missing_type: str
    ratio: float
    both_ratio: float  # 0.5 if it has no effect

    @classmethod
    def of(cls, spec: DatasetSpec, missing_type: str, ratio: float, both_ratio: float) -> "Pattern":
        """The normalised pattern, so that equal patterns compare equal. Raises ValueError if it is invalid."""
        if pattern_type(spec.modalities, missing_type) != missing_type:
            raise ValueError(f"missing_type: expected {' or '.join(spec.missing_types)}, found {quoted(missing_type)}")
        for share in (ratio, both_ratio):
            if type(share) not in (float, int) or not 0 <= share <= 1:
                raise ValueError(f"expected a ratio from 0 to 1, found {quoted(share)}")
        return cls(missing_type, float(ratio), float(both_ratio) if missing_type == BOTH else 0.5)

    def place(self, spec: DatasetSpec) -> tuple[Any, ...]:
        """Sort key: missing types in the order of the dataset's row, each by `both_ratio` and ratio."""
        types = spec.missing_types
        known = types.index(self.missing_type) if self.missing_type in types else len(types)
        return known, self.missing_type, self.both_ratio, self.ratio

    @property
    def kind(self) -> str:
        """The missing type, followed by both_ratio unless that is 0.5."""
        return self.missing_type + ("" if self.both_ratio == 0.5 else f" {self.both_ratio:g}")

    @property
    def title(self) -> str:
        """The pattern for use in text."""
        return str(self) if self.ratio else "nothing missing"

    def __str__(self) -> str:
        return f"{per_cent(self.ratio)} {self.kind}"
