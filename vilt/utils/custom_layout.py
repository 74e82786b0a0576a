"""How the tables of a custom dataset are laid out: what its spec.yaml says, checked."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from common.errors import DataError
from common.messages import quoted
from vilt.datasets.custom import CUSTOM, CUSTOM_METRICS, CustomData
from vilt.datasets.specs import SPLITS, Split
from vilt.utils.raw_data import read_bytes

KEYS = ("name", "files", "columns", "labels", "separator", "classes", "metric")
COLUMNS = ("image", "text", "label", "split")
FORMATS = (".csv", ".tsv", ".jsonl")


@dataclass(frozen=True)
class Layout:
    """What a spec.yaml says; the defaults are those of `--table`, which does without."""

    source: Path
    """Where it says so, for messages."""
    tables: tuple[tuple[Path, Split | None], ...]
    """Each with the split of its rows; None where a column gives it."""
    name: str = CUSTOM
    columns: dict[str, str] = field(default_factory=lambda: {column: column for column in COLUMNS})
    """What the tables call each of COLUMNS."""
    labels: str = "single"
    separator: str = "|"
    """Between the labels of a row, in CSV and TSV."""
    classes: tuple[str, ...] | None = None
    """In the order of their numbers; None: those that occur, sorted."""
    metric: str | None = None

    def dataset(self, found: set[str]) -> CustomData:
        """The dataset, if `found` are the labels that occur. Raises DataError."""
        classes = self.classes if self.classes is not None else tuple(sorted(found))
        metric = next(iter(CUSTOM_METRICS[self.labels])) if self.metric is None else self.metric
        try:
            return CustomData.of({"name": self.name, "labels": self.labels, "class_names": classes, "metric": metric})
        except ValueError as error:
            raise DataError(f"{self.source}: {error}") from None


def table_layout(table: Path) -> Layout:
    """The layout of one table with a split column. Raises DataError."""
    try:
        return Layout(table, ((Path(_table("--table", str(table))), None),))
    except ValueError as error:
        raise DataError(str(error)) from None


def read_layout(path: Path, raw: Path) -> Layout:
    """What the spec.yaml at `path` says; its tables are relative to `raw`.

    Raises:
        DataError: it is not readable, or a value is unknown, of the wrong type or contradicts another one.
    """
    try:
        given = yaml.load(read_bytes(path), _PlainLoader)
    except RecursionError:
        raise DataError(f"{path} is not valid YAML: nested too deeply.") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that is none
        raise DataError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from None
    try:
        return _layout(path, raw, given)
    except ValueError as error:
        raise DataError(f"{path}: {error}") from None


def _layout(source: Path, raw: Path, given: Any) -> Layout:
    _check_keys("", given, KEYS)
    if "files" not in given:
        raise ValueError("files: expected a table, or one for each split, found none")
    values: dict[str, Any] = {key: given[key] for key in ("name", "metric") if key in given}  # CustomData checks them
    tables, columns, labels = _tables(given["files"]), given.get("columns", {}), given.get("labels", "single")
    _check_keys("columns.", columns, COLUMNS)
    if "split" in columns and len(tables) > 1:
        raise ValueError("columns.split: contradicts files, which has a table for each split")
    if labels not in tuple(CUSTOM_METRICS):
        raise _wrong("labels", " or ".join(CUSTOM_METRICS), labels)
    if "separator" in given:
        if labels != "multi":
            raise ValueError("separator: belongs to labels: multi, found labels: single")
        values["separator"] = _text("separator", given["separator"])
    if "classes" in given:
        values["classes"] = _classes(given["classes"])
    values["columns"] = {column: _text(f"columns.{column}", columns.get(column, column)) for column in COLUMNS}
    return Layout(source, tuple((raw / name, split) for name, split in tables), labels=labels, **values)


def _wrong(key: str, expected: str, value: object) -> ValueError:
    return ValueError(f"{key}: expected {expected}, found {quoted(value)}")


def _check_keys(prefix: str, value: object, known: Iterable[str]) -> None:
    if not isinstance(value, dict):
        raise _wrong(prefix.rstrip(".") or "the file", f"the keys {', '.join(known)}", value)
    for key in value:
        if key not in known:
            raise ValueError(f"unknown key {prefix}{str(key)[:100]}; expected {', '.join(known)}")


def _text(key: str, value: object) -> str:
    if not isinstance(value, str) or not value:
        raise _wrong(key, "a text", value)
    return value


def _classes(value: object) -> tuple[str, ...]:
    """Names; a number is one too. What YAML takes for a truth value (no, yes, on, off) is refused."""
    if not isinstance(value, list):
        raise _wrong("classes", "a list of names", value)
    for row, name in enumerate(value, 1):
        if isinstance(name, bool) or not isinstance(name, (str, int)):
            raise _wrong(f"classes, row {row}", "a name (in quotes, if YAML takes it for something else)", name)
    return tuple(str(name).strip() for name in value)


def _tables(value: object) -> list[tuple[str, Split | None]]:
    """The tables, each with the split of its rows; None for a single one."""
    if not isinstance(value, dict):
        return [(_table("files", value), None)]
    _check_keys("files.", value, SPLITS)
    missing = [split for split in SPLITS if split not in value]
    if missing:
        raise ValueError(f"files: expected a table for each of {', '.join(SPLITS)}, found none for {missing[0]}")
    return [(_table(f"files.{split}", value[split]), split) for split in SPLITS]


def _table(key: str, value: object) -> str:
    name = _text(key, value)
    if Path(name).suffix.lower() not in FORMATS:
        raise _wrong(key, f"a table, with a name that ends in {' or '.join(FORMATS)}", value)
    return name


class _PlainLoader(yaml.SafeLoader):
    """Refuses a mapping that repeats a key, of which PyYAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        counts = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        repeated = next((name for name, count in counts.items() if count > 1), None)
        if repeated is not None:
            problem = f"the key {quoted(repeated)} is repeated"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)
