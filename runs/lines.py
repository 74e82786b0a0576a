"""Groups runs into lines: runs that differ only in their seed form one line, with a mean and a spread.

A resumed run and those it was resumed from count as one (`find_runs`). The robustness table, the table of runs, the
report and the comparison all use this grouping.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

from common.text import Estimate, estimate
from config import DEFAULTS
from runs.comparable import ADDITIONS, additions, checkpoint_label, other_input
from runs.pattern import Pattern
from runs.run_reader import Run
from vilt.datasets.specs import DatasetSpec

if TYPE_CHECKING:
    from runs.stored_results import Robustness

T = TypeVar("T")
SWITCHES = {name for name, default in DEFAULTS.items() if default in ("", None, 0, 1)}  # equal to False and True, too
"""Options that are plain switches. A line names one only if it is not at its default."""


@dataclass(frozen=True, eq=False)
class RunLine(Generic[T]):
    """Runs, or items that stand for them, that differ only in their training seed."""

    run: Run | None  # one of the runs; None for a checkpoint without a record of its run, which is a line of its own
    items: list[T]  # one for each training seed, in ascending order
    repeats: list[T]  # further runs with these seeds, which do not count

    @property
    def options(self) -> dict[str, Any]:
        """The options in which the runs agree."""
        return {} if self.run is None else self.run.line

    def differing(self, lines: Sequence["RunLine[Any]"]) -> list[str]:
        """`option=value` for the options that set this line apart from others of its method in `lines`, and for those
        that every table names: other inputs, and additions to the method."""
        same = [other.options for other in lines if other.options.get("prompt_type") == self.options.get("prompt_type")]
        # Older runs lack digests, so a missing option is no difference; a missing entry of a dictionary is one.
        values = {
            name: {str(other.get(name)) for other in same if name in other or "." in name} for name in self.options
        }
        differ = {name for name, those in values.items() if len(those) > 1}
        shown = {name: f"{value:g}" if isinstance(value, float) else value for name, value in self.options.items()}
        shown["load_path"] = checkpoint_label(shown.get("load_path"))
        pairs, nothing = [(name, self.options.get(name), DEFAULTS[name]) for name in SWITCHES], ("", None)
        plain = {name for name, given, by in pairs if given == by or (given in nothing and by in nothing)}
        words = [f"{name}={value}" for name, value in shown.items() if name in differ.difference(ADDITIONS, plain)]
        return list(dict.fromkeys([*other_input(self.options), *additions(self.options), *words]))


def lines_of(items: Sequence[T], run_of: Callable[[T], Run | None]) -> list[RunLine[T]]:
    """Groups items into lines, in the order of each line's first item.

    If several runs have the same seed, the most complete one counts (robustness results weigh more than a test result)
    or, among equals, the last one.
    """
    groups: dict[Any, list[tuple[Run | None, T]]] = {}
    for item in items:
        run = run_of(item)
        groups.setdefault(id(item) if run is None else (run.line_key, run.pattern), []).append((run, item))
    lines = []
    for group in groups.values():
        by_seed: dict[int, list[T]] = {}
        for run, item in sorted(group, key=lambda entry: _completeness(entry[0])):
            by_seed.setdefault(0 if run is None else run.config["seed"], []).append(item)
        kept = [same_seed[-1] for _, same_seed in sorted(by_seed.items())]
        repeats = [item for same_seed in by_seed.values() for item in same_seed[:-1]]
        lines.append(RunLine(group[0][0], kept, repeats))
    return lines


def _completeness(run: Run | None) -> tuple[bool, ...]:
    files = ("robustness/robustness.json", "test_results.json")
    return tuple(run is not None and (run.folder / name).is_file() for name in files)


class Spread(NamedTuple):
    """A mean with its deviation, and what that is taken over: `3 training seeds`, `5 missing tables`, or nothing."""

    estimate: Estimate
    over: str


def spread_of(values: Sequence[Sequence[float]]) -> Spread | None:
    """The spread over training seeds, given each run's values at its missing tables; None if there are no values.

    For a single run, it is the spread over its tables, which says how much depends on which samples lose what.
    """
    run_estimates = [found for run_values in values if (found := estimate(run_values)) is not None]
    if not run_estimates:
        return None
    if len(run_estimates) > 1:
        means = estimate([found.mean for found in run_estimates])
        assert means is not None
        return Spread(means, f"{len(run_estimates)} training seeds")
    (only,) = run_estimates
    return Spread(only, f"{only.n + only.undefined} missing tables" if only.n > 1 else "")


def spreads_of(metric: str, results: "Sequence[Robustness]", spec: DatasetSpec) -> dict[Pattern, Spread]:
    """A metric's spread in the results of a line's runs, by pattern, sorted by type and ratio.

    Patterns whose results lack the metric are left out.
    """
    found: dict[Pattern, Spread] = {}
    patterns = {pattern for each in results for pattern in each.cells}
    for pattern in sorted(patterns, key=lambda pattern: pattern.place(spec)):
        cells = [cell["metrics"] for each in results if (cell := each.at(pattern))]
        if spread := spread_of([metrics[metric]["values"] for metrics in cells if metric in metrics]):
            found[pattern] = spread
    return found
