"""Which runs belong together: those that differ in their seed alone are one line, and give a mean and a spread.

Others are different lines. A run that was resumed is one run with those that it was resumed from (`find_runs`). The
robustness table, the table of runs, the report and the comparison all follow this rule, from here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

from common.text import Estimate, estimate
from config import DEFAULTS
from runs.comparable import ADDITIONS, additions, checkpoint_label, other_input
from runs.run_reader import Run

T = TypeVar("T")
SWITCHES = {name for name, default in DEFAULTS.items() if default in ("", None, 0, 1)}  # equal to False and True, too
"""Options that are on or off by default: where one is as by default, a line need not say so, as others say theirs."""


@dataclass(frozen=True, eq=False)
class RunLine(Generic[T]):
    """Runs, or what stands for them, that differ in their training seed alone."""

    run: Run | None  # one of them; None for a checkpoint without a record of its run, which is a line of its own
    items: list[T]  # one for each training seed, the lowest first
    repeats: list[T]  # others of these seeds, which do not count

    @property
    def options(self) -> dict[str, Any]:
        """Those in which the runs agree."""
        return {} if self.run is None else self.run.line

    def differing(self, lines: Sequence["RunLine[Any]"]) -> list[str]:
        """`option=value` for the options in which its method's lines among `lines` differ, and for what every table
        names: other inputs, and what it has beside the method."""
        same = [other.options for other in lines if other.options.get("prompt_type") == self.options.get("prompt_type")]
        # Older runs have no digests of what they read; of a dictionary's entry a run without it has another value.
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
    """The lines of runs, in the order of their first ones.

    Of two runs with the same seed the more complete one counts (with robustness results, else with a test result), of
    equals the last one.
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
        kept = [of_seed[-1] for _, of_seed in sorted(by_seed.items())]
        repeats = [item for of_seed in by_seed.values() for item in of_seed[:-1]]
        lines.append(RunLine(group[0][0], kept, repeats))
    return lines


def _completeness(run: Run | None) -> tuple[bool, ...]:
    files = ("robustness/robustness.json", "test_results.json")
    return tuple(run is not None and (run.folder / name).is_file() for name in files)


class Spread(NamedTuple):
    """A mean with its deviation, and what that is over: `3 training seeds`, `5 missing tables`, or nothing."""

    estimate: Estimate
    over: str


def spread_of(values: Sequence[Sequence[float]]) -> Spread | None:
    """The spread over training seeds of what each run of a line gives at its missing tables; None of no values.

    Of one run it is the spread over its tables, another thing: how much depends on which samples lose what.
    """
    of_runs = [found for run_values in values if (found := estimate(run_values)) is not None]
    if not of_runs:
        return None
    if len(of_runs) > 1:
        means = estimate([found.mean for found in of_runs])
        assert means is not None
        return Spread(means, f"{len(of_runs)} training seeds")
    (only,) = of_runs
    return Spread(only, f"{only.n + only.undefined} missing tables" if only.n > 1 else "")
