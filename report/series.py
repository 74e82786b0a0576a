"""Which runs belong together: those that differ in their seed alone are one series, and give mean and deviation."""

import json
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from clip.option_names import OF_OTHER_COMMANDS
from clip.tasks import TASKS
from report.collect import Cell, ClassScores, Robustness, Run
from report.estimate import Estimate, estimate
from report.text import without_home
from vilt.missing_tables import MISSING_TYPES

METHODS = ("CoOp", "MAP", "MaPLe", "DePT", "MMP", "DCP", "REP")
"""The published ones, as the published table writes them."""
METRIC_TITLES = {
    "f1_macro": "F1-macro",
    "f1_micro": "F1-micro",
    "f1_samples": "F1-samples",
    "f1_weighted": "F1-weighted",
    "accuracy": "accuracy",
    "auroc": "AUROC",
}
NOT_THE_METHOD = {
    *("exp_name", "seed", "log_dir", "resume_from", "fast_dev_run", "test_after_fit", "test_only"),
    *("test_ratio", "test_type", "test_exp_name", "missing_ratio.test", "missing_type.test"),
    *("data_root", "missing_table_root", "num_workers", "per_gpu_batchsize"),
    *("num_gpus", "num_nodes", "cpu_processes", "image_size", "trust_backbone", "skip_bad_steps"),
    *("image_cache", "activation_checkpointing"),
    "compile",  # of older runs
    *OF_OTHER_COMMANDS,
}
"""Options in which the runs of a series may differ: names, places, the machine, the test pattern, other commands."""


OTHER_METHODS = {
    "map_input": "MAP",
    "map_attention": "MAP, attention level",
    "msp": "MSP",
    "none": "head alone",
}
"""Titles of methods that the published table does not have, or has under another name."""
ABLATION = {
    (False, False): "baseline",
    (True, False): "baseline + FAR",
    (False, True): "baseline + FMB",
    (True, True): "REP",
}
"""Titles of REP without its parts, by the options far and fmb."""


class Pattern(NamedTuple):
    """What was missing, in training or in an evaluation. `both_ratio` is 0.5 where it has no effect."""

    missing_type: str
    ratio: float
    both_ratio: float

    @classmethod
    def of(cls, missing_type: str, ratio: float, both_ratio: float) -> "Pattern":
        """The one spelling of a pattern, so that equal ones compare equal."""
        return cls(missing_type, round(float(ratio), 9), round(float(both_ratio), 9) if missing_type == "both" else 0.5)

    @property
    def available(self) -> tuple[float, float]:
        """Shares of samples that have their image and their text."""
        image_share = {"text": 0.0, "image": 1.0, "both": self.both_ratio}[self.missing_type]
        image, text = 1 - self.ratio * image_share, 1 - self.ratio * (1 - image_share)
        return round(image, 9), round(text, 9)

    @property
    def kind(self) -> str:
        """The missing type, with the share of images where that is not a half."""
        return self.missing_type + ("" if self.both_ratio == 0.5 else f" ({self.both_ratio:.0%} image)")

    def __str__(self) -> str:
        return f"{100 * self.ratio:g} % missing, {self.kind}" if self.ratio else "nothing missing"


@dataclass(frozen=True)
class Series:
    """Runs of one method, configuration and training pattern, one per seed, lowest seed first."""

    method: str
    """As the published table writes it, where it has it, else the option prompt_type."""
    variant: str
    """The method, with the options that tell it from others of that method in the same report."""
    pattern: Pattern
    """Of the training."""
    label: str
    """The variant, with the pattern where that differs within the dataset."""
    runs: tuple[Run, ...]

    @property
    def results(self) -> list[tuple[Run, Robustness]]:
        """The runs that have robustness results, with them."""
        return [(run, run.robustness) for run in self.runs if run.robustness is not None]

    @property
    def patterns(self) -> list[Pattern]:
        """The patterns that robustness results give, by type and ratio."""
        found = {pattern_of(cell) for _, robustness in self.results for cell in robustness.cells}
        return sorted(found, key=lambda p: (MISSING_TYPES.index(p.missing_type), p.both_ratio, p.ratio))

    def at(self, pattern: Pattern, metric: str) -> Estimate | None:
        """Mean and deviation at an evaluation pattern over all values, of train seeds and table seeds alike."""
        cells = [cell_at(robustness, pattern) for _, robustness in self.results]
        return estimate([value for cell in cells if cell is not None for value in cell.values[metric]])

    def by_type(self, type_name: str, metric: str) -> Estimate | None:
        """Mean and deviation over train seeds where every sample has missing type `type_name`."""
        return estimate([robustness.by_type[type_name][metric] for _, robustness in self.results])

    @property
    def classes(self) -> list[str]:
        """Class names, most frequent first; none where there are no results by class."""
        return [scores.name for scores in sorted(self._scores("complete"), key=lambda scores: -scores.support)]

    def support(self, name: str) -> int:
        """Test samples of a class."""
        return next(scores.support for scores in self._scores("complete") if scores.name == name)

    def of_class(self, type_name: str, name: str, score: str) -> Estimate | None:
        """Mean and deviation over train seeds of a class's `score`: precision, recall or f1."""
        found = [entry for _, robustness in self.results for entry in robustness.per_class]
        return estimate(
            [getattr(entry, score) for entry in found if (entry.type_name, entry.name) == (type_name, name)]
        )

    def _scores(self, type_name: str) -> list[ClassScores]:
        """Of the first run."""
        first = [robustness.per_class for _, robustness in self.results][:1]
        return [scores for per_class in first for scores in per_class if scores.type_name == type_name]

    def at_own_pattern(self) -> Estimate | None:
        """Mean and deviation over train seeds of the chosen metric, at the pattern of the training.

        A run counts with its mean over table seeds, or with its test result where it has no robustness results.
        """
        values = [own_pattern_result(run, self.pattern) for run in self.runs]
        return estimate([value for value in values if value is not None])


@dataclass(frozen=True)
class Dataset:
    """The runs of one task."""

    task: str
    runs: tuple[Run, ...]
    series: tuple[Series, ...]
    repeats: tuple[Run, ...]
    """Runs that do not count: a later or more complete one has the same configuration and seed."""

    @property
    def metric(self) -> str:
        """The metric of the task."""
        return self.runs[0].metric

    @property
    def measured(self) -> tuple[Series, ...]:
        """The series that have robustness results."""
        return tuple(series for series in self.series if series.results)

    @property
    def metric_title(self) -> str:
        """As texts and figures name it."""
        return METRIC_TITLES[self.metric]


def by_dataset(runs: Sequence[Run]) -> list[Dataset]:
    """One entry per dataset that occurs, in the order of TASKS, then one's own."""
    own = sorted({run.task for run in runs} - set(TASKS))
    return [
        _dataset(task, [run for run in runs if run.task == task])
        for task in (*TASKS, *own)
        if any(run.task == task for run in runs)
    ]


def train_pattern(run: Run) -> Pattern:
    """The pattern that a run was trained at."""
    return split_pattern(run, "train")


def split_pattern(run: Run, split: str) -> Pattern:
    """The pattern of one split of a run."""
    config = run.config
    return Pattern.of(config["missing_type"][split], config["missing_ratio"][split], config["both_ratio"])


def pattern_of(cell: Cell) -> Pattern:
    """The pattern of a robustness cell."""
    return Pattern.of(cell.missing_type, cell.ratio, cell.both_ratio)


def cell_at(robustness: Robustness, pattern: Pattern) -> Cell | None:
    """The cell of a pattern, if there is one; the first where several are the same without both_ratio."""
    return next((cell for cell in robustness.cells if pattern_of(cell) == pattern), None)


def own_pattern_result(run: Run, pattern: Pattern) -> float | None:
    """The task's metric of one run at `pattern`: mean over table seeds, else the test result at that pattern."""
    metric = run.metric
    cell = cell_at(run.robustness, pattern) if run.robustness is not None else None
    if cell is not None:
        return statistics.fmean(cell.values[metric])
    if run.test is not None:
        tested = run.test["missing_pattern"]
        if Pattern.of(tested["missing_type"], tested["ratio"], tested["both_ratio"]) == pattern:
            return float(run.test["metrics"][metric])
    return None


def method_title(prompt_type: str) -> str:
    """The method as the published table writes it, else as the option does."""
    published = (name for name in METHODS if name.casefold() == prompt_type.casefold())
    return OTHER_METHODS.get(prompt_type) or next(published, prompt_type)


def flat(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Options and values; those of a dictionary as `option.key`."""
    for name, value in config.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _dataset(task: str, runs: list[Run]) -> Dataset:
    groups: dict[tuple[str, Pattern], dict[int, list[Run]]] = {}
    options_of: dict[str, dict[str, Any]] = {}
    for run in runs:
        if not run.is_evaluation:
            options = _method_options(run)
            key = json.dumps(options, sort_keys=True)
            options_of[key] = options
            groups.setdefault((key, train_pattern(run)), {}).setdefault(run.config["seed"], []).append(run)
    variants = _variant_titles(options_of)
    series, repeats = [], []
    for (key, pattern), by_seed in groups.items():
        kept = []
        for _, of_seed in sorted(by_seed.items()):
            *others, best = sorted(of_seed, key=lambda run: (run.robustness is not None, run.test is not None))
            kept.append(best)
            repeats += others
        method = method_title(str(options_of[key]["prompt_type"]))
        series.append(Series(method, variants[key], pattern, variants[key], tuple(kept)))
    if len({one.pattern for one in series}) > 1:
        series = [replace(one, label=f"{one.variant}, trained with {one.pattern}") for one in series]
    return Dataset(task, tuple(runs), tuple(series), tuple(repeats))


def _method_options(run: Run) -> dict[str, Any]:
    """The options in which runs of one variant agree; the training pattern is not among them."""
    options = dict(flat(run.config))
    left_out = set(NOT_THE_METHOD) | {"missing_ratio.train", "missing_type.train", "both_ratio"}
    if split_pattern(run, "val") == train_pattern(run):
        left_out |= {"missing_ratio.val", "missing_type.val"}
    return {name: value for name, value in options.items() if name not in left_out}


def _variant_titles(options_of: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Method and, where a method occurs with several configurations, the options in which they differ."""
    titles = {}
    for key, options in options_of.items():
        same_method = [other for other in options_of.values() if other["prompt_type"] == options["prompt_type"]]
        differing = [name for name in options if _differs(name, same_method)]
        title = method_title(str(options["prompt_type"]))
        if options["prompt_type"] == "rep":
            title = ABLATION[options.get("far", True), options.get("fmb", True)]
            differing = [name for name in differing if name not in ("far", "fmb")]
        titles[key] = " ".join([title, *(without_home(f"{name}={options[name]}") for name in differing)])
    return titles


def _differs(name: str, configurations: Iterable[dict[str, Any]]) -> bool:
    return len({json.dumps(options.get(name)) for options in configurations}) > 1
