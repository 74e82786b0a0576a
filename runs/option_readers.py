"""Readers for options that need more than a type check: tasks, missing types, services, precisions, columns.

Nothing here loads torch; see `config.py`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from common.errors import ConfigError
from common.messages import suggestion
from common.readers import Reader, one_of, text, wrong
from vilt.datasets.custom import CUSTOM
from vilt.datasets.specs import DATASETS, EVERY_DATASET, SPLITS, VALIDATION, DatasetSpec
from vilt.missing_tables import PUBLISHED
from vilt.missing_types import ANY, BOTH, JOIN, SOME, pattern_type

MISSING_TYPES = list(EVERY_DATASET[CUSTOM].missing_types)
OF_OTHERS = {ANY: BOTH, SOME: BOTH, BOTH: ANY}
"""What a missing type is called with another number of modalities."""
PRECISIONS = {"32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed"}


def task_name(option: str, value: Any) -> str:
    """Reads the name of a task."""
    if not isinstance(value, str) or value not in EVERY_DATASET:
        hint = suggestion(value, [*EVERY_DATASET]) or f"; a custom dataset is {CUSTOM}"
        raise ConfigError(f"{wrong(option, ' or '.join(DATASETS), value)}{hint}")
    return str(value)


def split_name(option: str, value: Any) -> str:
    """Reads a split; validation may also have another of its names, such as `dev`."""
    return one_of(*SPLITS)(option, VALIDATION.get(value, value) if isinstance(value, str) else value)


@dataclass(frozen=True)
class MissingTypeReader:
    """Reads missing types, checked against the modalities of the task.

    Args:
        shape: turns a reader of one missing type into a reader of the option.
        default: the option's default. In its place, tasks with other types get `otherwise`, or all of their types. Of
            a default keyed by split, entries that were not set are replaced.
    """

    shape: Callable[[Reader], Reader]
    default: Any = None
    otherwise: str | None = None

    def __call__(self, option: str, value: Any, row: DatasetSpec | None = None) -> Any:
        known = MISSING_TYPES if row is None else list(row.missing_types)
        if value and known != MISSING_TYPES:
            other = self.otherwise if self.otherwise in known else BOTH
            if value == self.default:
                value = known if self.otherwise is None else dict.fromkeys(value, other)
            elif isinstance(value, Mapping) and row is not None and option not in row.options:  # one entry was set
                value = {name: other if each == self.default[name] else each for name, each in value.items()}
        if row is not None and not row.modalities:  # known only from the data
            return self.shape(text)(option, value)
        modalities = EVERY_DATASET[CUSTOM].modalities if row is None else row.modalities

        def read(option: str, value: Any) -> str:
            if (found := pattern_type(modalities, str(value))) is None:
                several = f", or several as {JOIN.join([*modalities][:2])}" if len(modalities) > 2 else ""
                error = wrong(option, f"{' or '.join(known)}{several}", value)
                like = OF_OTHERS.get(str(value))
                hint = f"; did you mean {like}?" if like in known else suggestion(value, known)
                raise ConfigError(f"{error}{hint}")
            return found

        return self.shape(read)(option, value)


def logging_service(option: str, value: Any) -> str:
    """Reads the name of a service that metrics are sent to; its package must be installed."""
    name = one_of("wandb", "mlflow")(option, value)
    if find_spec(name) is None:
        raise ConfigError(
            f"{option}={name}: its package is not installed; install it with python -m pip install {name}"
        )
    return name


def precision_name(option: str, value: Any) -> str:
    """Reads 32, 16 or bf16, in this or Lightning's spelling, or `published`."""
    word = str(value)
    if word == PUBLISHED or word in PRECISIONS.values():
        return word
    if word not in PRECISIONS:
        raise wrong(option, "32, 16, bf16 or published", value)
    return PRECISIONS[word]


def sort_order(option: str, value: Any) -> str:
    """Reads a column of the table of runs, preceded by `-` for descending order."""
    from runs.run_table import COLUMNS

    if str(value).removeprefix("-") not in COLUMNS:
        raise wrong(option, f"{', '.join(COLUMNS)}, or one of these with - in front", value)
    return str(value)
