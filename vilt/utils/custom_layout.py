"""Reads and checks spec.yaml, which describes the tables of a custom dataset."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from common.errors import ConfigError, DataError, reason_of
from common.messages import quoted
from common.readers import dictionary, one_of, several, wrong
from vilt.datasets.custom import CUSTOM, CUSTOM_METRICS, CustomData
from vilt.datasets.specs import SPLITS, Split
from vilt.utils.names import find_file, label_name, look_alikes, normal, whole
from vilt.utils.raw_data import read_bytes
from vilt.utils.tables import FORMATS

KEYS = ("name", "files", "columns", "labels", "separator", "classes", "metric")
COLUMNS = ("image", "text", "label", "split")


@dataclass(frozen=True)
class Layout:
    """The content of a spec.yaml."""

    source: Path
    """The file that the layout comes from, for messages."""
    tables: tuple[tuple[Path, Split | None], ...]
    """The tables, each with the split of its rows, or None if a column gives it."""
    columns: dict[str, str]
    """The tables' names for each of COLUMNS."""
    labels: str
    separator: str
    """Separator of the labels of a row, in CSV and TSV."""
    classes: tuple[str, ...] | None
    """Class names in the order of their numbers; None: the labels that occur, sorted."""
    name: Any
    metric: Any
    split_is_named: bool = False
    """Whether the spec names the column `split`."""

    @property
    def needed(self) -> list[str]:
        """Columns that a table must have. That of splits is optional unless the spec names it: splits may be drawn."""
        return [name for column, name in self.columns.items() if column != "split" or self.split_is_named]

    def dataset(self, found: set[str]) -> CustomData:
        """The description of the dataset, given the labels `found` in its tables. Raises DataError."""
        classes = tuple(sorted(found)) if self.classes is None else self.classes
        if pair := look_alikes(classes):
            raise DataError(f"{self.source}: the labels {' and '.join(pair)} look the same; write them the same way")
        try:
            return CustomData.from_dict(
                {"name": self.name, "labels": self.labels, "class_names": classes, "metric": self.metric}
            )
        except ValueError as error:
            raise DataError(f"{self.source}: {error}") from None


def read_layout(raw: Path, spec: Path | None, table: Path | None) -> Layout:
    """Reads the spec.yaml at `spec`, by default that in `raw`; or returns the default layout for `table`.

    Raises:
        DataError: the file is unreadable, or a value is unknown, has the wrong type or contradicts another one.
    """
    source = table or spec or raw / "spec.yaml"
    try:
        if table is not None:
            return _layout(source, Path(), {"files": str(table)})
        return _layout(source, raw, read_yaml(source))
    except OSError as error:  # a file name that is too long
        raise DataError(f"{source}: {reason_of(error)}") from None
    except ConfigError as error:
        raise DataError(f"{source}: {error}") from None


def read_yaml(source: Path) -> Any:
    """The content of a YAML file, with all scalars as texts. Raises DataError."""
    try:
        return yaml.load(read_bytes(source), _PlainLoader)
    except RecursionError:
        raise DataError(f"{source} is not valid YAML: nested too deeply") from None
    except yaml.YAMLError as error:
        raise DataError(f"{source} is not valid YAML: {' '.join(str(error).split())}") from None
    except ValueError as error:  # PyYAML on an invalid date
        raise DataError(f"{source}: {error}") from None


def _layout(source: Path, folder: Path, given: Any) -> Layout:
    given = _known("", given, KEYS)
    columns = _known("columns.", given.get("columns"), COLUMNS)
    tables: tuple[tuple[Path, Split | None], ...]
    if isinstance(files := given.get("files"), dict):
        files = _known("files.", files, SPLITS)
        tables = tuple((find_file(folder, _table(f"files.{split}", files.get(split))), split) for split in SPLITS)
        if "split" in columns:
            raise ConfigError("columns.split: contradicts files, which has a table for each split")
        if len({path for path, _ in tables}) < len(tables):
            raise ConfigError(
                "files: expected a different table for each split, found one twice; for a single table with a column "
                "split, use files: TABLE"
            )
    else:
        tables = ((find_file(folder, _table("files", files)), None),)
    labels = one_of(*CUSTOM_METRICS)("labels", given.get("labels", "single"))
    if "separator" in given and labels != "multi":
        raise ConfigError(f"separator: only for labels: multi, found labels: {labels}")
    return Layout(
        source,
        tables,
        {column: normal(_name(f"columns.{column}", columns.get(column, column))) for column in COLUMNS},
        labels,
        _name("separator", given.get("separator", "|")),
        tuple(map(label_name, several(_name)("classes", given["classes"]))) if "classes" in given else None,
        given.get("name", CUSTOM),  # CustomData checks this and the next
        given.get("metric", next(iter(CUSTOM_METRICS[labels]))),
        "split" in columns,
    )


def _known(prefix: str, value: object, known: Iterable[str]) -> dict[str, Any]:
    """`value`, checked to be a dictionary with no keys but those in `known`."""
    values = dictionary(prefix.rstrip(".") or "the file", value)
    for key in values:
        if key not in known:
            raise ConfigError(f"unknown key {prefix}{key[:100]}; expected {', '.join(known)}")
    return values


def _name(key: str, value: object) -> str:
    """Reads a name; from Python it may also be an integer."""
    name = whole(value)
    if isinstance(name, bool) or not isinstance(name, (str, int)) or name == "":
        raise wrong(key, "a name", value)
    return str(name)


def _table(key: str, value: object) -> str:
    if not isinstance(value, str) or Path(value).suffix.lower() not in FORMATS:
        raise wrong(key, f"a table whose name ends in {' or '.join(FORMATS)}", value)
    return value


class _PlainLoader(yaml.BaseLoader):
    """Takes every scalar as text, exactly as written: 007, 1.10, no and 12:30 are names.

    Refuses mappings that repeat a key; PyYAML would silently keep the last.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        counts = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        repeated = [name for name, count in counts.items() if count > 1]
        if repeated:
            problem = f"the key {quoted(repeated[0])} is repeated"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)
