"""The description of a custom dataset, stored in its arrow files, in checkpoints and in run folders."""

import re
from dataclasses import dataclass, fields
from typing import Literal, Self, get_args

from common.messages import listed, quoted
from vilt.utils.names import look_alikes, normal

CUSTOM, SENSORS = CUSTOM_TASKS = ("custom", "sensors")
"""Task names and arrow file prefixes of custom datasets: of images and texts, and of sensor signals."""
Labels = Literal["single", "multi"]
CUSTOM_METRICS: dict[str, dict[str, str]] = {
    "single": {"accuracy": "class_accuracy", "f1_macro": "macro_f1_and_accuracy", "auroc": "auroc_and_accuracy"},
    "multi": {"f1_macro": "multilabel_f1"},
}
"""For each kind of labels: the metrics that can choose the best model, default first, and the function that measures
each of them along with others."""
MOST_MODALITIES = 4
NO_MODALITIES = ("any", "some", "both", "complete", "id")
"""Reserved words, which cannot name a modality: missing patterns, and a column of tables."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


@dataclass(frozen=True)
class CustomData:
    """Name, labels, classes and metric of a dataset.

    Raises:
        ValueError: a value has the wrong type or contradicts another one; the message names it, and says what was
            expected and found.
    """

    name: str
    """Name of the dataset in tables and reports."""
    labels: Labels
    """Whether a sample has exactly one label or any number of them."""
    class_names: tuple[str, ...]
    metric: str
    """Metric that chooses the best model."""
    signals: tuple[tuple[str, int, int, int, int, float], ...] = ()
    """For each modality of a sensor dataset: name, channels, intervals per sample, values per interval, step from one
    interval to the next in values, rate in Hz. Empty for other datasets."""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not NAME.fullmatch(self.name):
            raise ValueError(f"name: expected letters, digits, - and _, found {quoted(self.name)}")
        if self.labels not in get_args(Labels):
            raise ValueError(f"labels: expected {' or '.join(get_args(Labels))}, found {quoted(self.labels)}")
        self._check_classes()
        metrics = CUSTOM_METRICS[self.labels]
        if self.metric not in tuple(metrics):
            expected = " or ".join(metrics)
            raise ValueError(f"metric: expected {expected} with labels: {self.labels}, found {quoted(self.metric)}")
        if self.metric == "auroc" and self.n_classes != 2:
            raise ValueError(f"metric: auroc needs 2 classes, found {self.n_classes}")
        self._check_signals()

    def _check_signals(self) -> None:
        names = [name for name, *_ in self.signals]
        for name, *sizes, rate in self.signals:
            if not isinstance(name, str) or not NAME.fullmatch(name) or name.lower() in NO_MODALITIES:
                expected = f"expected letters, digits, - and _ in a name, and not {' or '.join(NO_MODALITIES)}"
                raise ValueError(f"modalities: {expected}, found {quoted(name)}")
            known = type(rate) in (int, float) and rate > 0 and all(type(size) is int and size > 0 for size in sizes)
            if len(sizes) != 4 or not known:
                raise ValueError(f"modalities: {name}: expected four sizes and a rate, found {[*sizes, rate]}")
        if names and not 2 <= len({name.lower() for name in names}) == len(names) <= MOST_MODALITIES:
            raise ValueError(f"modalities: expected 2 to {MOST_MODALITIES} different names, found {listed(names)}")
        if self.signals and self.labels != "single":
            raise ValueError(f"labels: expected single for signals, found {self.labels}")

    def _check_classes(self) -> None:
        rows: dict[str, int] = {}
        for row, name in enumerate(self.class_names, 1):
            if not isinstance(name, str) or not name.strip():
                raise ValueError(f"classes: expected a name in row {row}, found {quoted(name)}")
            if rows.setdefault(name, row) != row:
                raise ValueError(f"classes: {quoted(name)} is listed twice, in rows {rows[name]} and {row}")
        least = 2 if self.labels == "single" else 1
        if self.n_classes < least:
            found = f"{self.n_classes} ({listed(self.class_names)})" if self.class_names else "none"
            raise ValueError(f"classes: expected at least {least}, found {found}")

    @classmethod
    def from_dict(cls, value: object) -> Self:
        """A CustomData made from a dict of its fields, as stored in JSON and checkpoints. Raises ValueError."""
        names = [field.name for field in fields(cls) if field.name != "signals"]
        if not isinstance(value, dict) or set(value) - {"signals"} != set(names):
            found = listed(list(value)) if isinstance(value, dict) else quoted(value)
            raise ValueError(f"expected the values {', '.join(names)} of a dataset, found {found}")
        if not isinstance(value["class_names"], (list, tuple)):
            raise ValueError(f"class_names: expected a list, found {quoted(value['class_names'])}")
        signals = value.get("signals", ())
        if not isinstance(signals, (list, tuple)) or not all(isinstance(one, (list, tuple)) and one for one in signals):
            raise ValueError(f"signals: expected a list of modalities with their sizes, found {quoted(signals)}")
        lists = {"class_names": tuple(value["class_names"]), "signals": tuple(map(tuple, signals))}
        return cls(**{**value, **lists})

    @property
    def task(self) -> str:
        """One of CUSTOM_TASKS."""
        return SENSORS if self.signals else CUSTOM

    @property
    def n_classes(self) -> int:
        """Number of classes C."""
        return len(self.class_names)

    @property
    def key(self) -> str:
        """Identifies the dataset in tables and file names."""
        return f"{self.task}_{self.name}"

    def difference(self, other: "CustomData") -> str | None:
        """How labels, modalities or classes of `other` differ from these, for messages; None if they are the same."""
        if other.labels != self.labels:
            return f"expected labels: {self.labels}, found labels: {other.labels}"
        if other.signals != self.signals:
            return f"expected the modalities {list(self.signals)}, found {list(other.signals)}"
        if other.n_classes != self.n_classes:
            return f"expected {self.n_classes} classes, found {other.n_classes}"
        for number, (ours, theirs) in enumerate(zip(self.class_names, other.class_names, strict=True)):
            if normal(ours) != normal(theirs):
                expected, found = look_alikes((ours, theirs)) or (quoted(ours), quoted(theirs))
                return f"expected {expected} as class {number}, found {found}"
        return None
