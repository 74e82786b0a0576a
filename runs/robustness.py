"""`run.py robustness`: evaluates checkpoints at every missing pattern from their logits, and prints the tables."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from lightning_utilities.core.rank_zero import rank_zero_only

from common.errors import CheckpointError
from common.logs import without_repeats
from common.text import (
    AT_OFFSET,
    baseline_texts,
    counted,
    interval_text,
    metric_text,
    per_cent,
    terminal_table,
)
from engine.checkpoint import read_checkpoint
from engine.ensemble import merged_checkpoint
from engine.exported import is_exported
from engine.processes import ending_together
from engine.robustness import Results, measure, write_results
from engine.stored_logits import LogitStore, logit_columns_of
from engine.trainer import make_trainer
from engine.training import FinetuneModule
from runs.check_options import read_load_paths
from runs.evaluation import check_measurable, open_evaluation
from runs.lines import lines_of, spreads_of
from runs.pattern import Pattern
from runs.start import log_device
from runs.stored_results import Robustness
from runs.targets import Target, dataset_of, open_targets
from vilt.datamodules import MissingModalityData
from vilt.datasets.specs import DatasetSpec
from vilt.missing_types import BOTH

log = logging.getLogger("rep")


def measure_all(config: Mapping[str, Any], given: set[str]) -> str:
    """Evaluates the checkpoints in `load_path` at all missing types and ratios; "" except on the first process."""
    with without_repeats(log):
        measured = [(target, measure_target(target, given)) for target in open_targets(config, given)]
    found = [(target, results) for target, results in measured if results is not None]
    if len(found) > 1 and all(path.is_file() or is_exported(path) for path in read_load_paths(config)):
        if len({target.subject.other_input for target, _ in found}) == 1:
            found.append(measure_mean([target for target, _ in found]))
        else:
            log.info("the logits are not averaged, since text_windows or group_texts differ")
    names = dict.fromkeys(dataset_of(target) for target, _ in found)
    return "\n\n".join(describe([each for each in found if dataset_of(each[0]) == name]) for name in names)


def measure_target(target: Target, given: set[str]) -> Results | None:
    """Computes a target's logits unless they are stored, and writes its results; None except on the first process.

    Raises:
        CheckpointError: the checkpoint has been replaced since the target was opened.
    """
    options, subject, store = target.options, target.subject, target.store
    if target.encoded:
        log.info("%s: uses the stored logits", subject.checkpoint)
    else:
        store.check_writable()
        log_device(options)
        checkpoint = read_checkpoint(subject.checkpoint)
        if checkpoint.sha256 != subject.checkpoint_sha256:
            raise CheckpointError(f"{subject.checkpoint}: has just been replaced by another checkpoint; start again")
        classifier, data = open_evaluation(options, [checkpoint], given)
        check_measurable(data, subject.task)
        trainer = make_trainer(options, None, steps_per_epoch=1)
        with data.report_dead_workers(), ending_together(trainer):
            encode(store, FinetuneModule(classifier, checkpoint.spec), trainer, data)
    if getattr(rank_zero_only, "rank", 0):
        return None
    found = measure(subject, store.load(), target.patterns, options.bootstrap)
    names = write_results(found, store.folder)
    log.info("written to %s: %s", store.folder, ", ".join(["logits.arrow", *names]))
    return found


def encode(store: LogitStore, module: FinetuneModule, trainer: pl.Trainer, data: MissingModalityData) -> None:
    """Computes the logits in one pass over the test split per missing type, except types an interrupted run has stored.

    All processes take part; the first one writes.
    """
    dataset, logits = data.datasets["test"], store.load_part()
    names = zip(logit_columns_of(dataset.spec), dataset.spec.type_names, strict=True)
    for number, (column, name) in enumerate(names):
        if column in logits:
            log.info("%s: already computed by an interrupted run", name)
            continue
        total, samples = len(dataset.spec.type_names), counted(len(dataset), "sample")
        log.info("encoding %d of %d: %s, %s", number + 1, total, name, samples)
        dataset.missing_table = np.full(dataset.n_rows, number, dtype=np.int8)
        trainer.test(module, datamodule=data, verbose=False)
        assert module.tested is not None and len(module.tested[0]) == len(dataset)
        logits[column] = module.tested[0]
        if trainer.is_global_zero:
            store.write(logits)


def measure_mean(targets: Sequence[Target]) -> tuple[Target, Results]:
    """Writes the results of targets as one model that averages their logits, which must all be stored."""
    first, subjects = targets[0], [target.subject for target in targets]
    checkpoint = merged_checkpoint([read_checkpoint(subject.checkpoint) for subject in subjects])
    logits = [target.store.load() for target in targets]
    mean_TNC = torch.stack([one.logits_TNC for one in logits]).mean(0)
    name = f"mean_{checkpoint.sha256[:12]}"
    subject = replace(
        first.subject,
        checkpoint=checkpoint.path,
        checkpoint_sha256=checkpoint.sha256,
        offset=checkpoint.offset,
        method="mean of the logits",
        exp_name=name,
        train_seed=None,
        train_pattern=first.subject.train_pattern if len({str(one.train_pattern) for one in subjects}) == 1 else None,
    )
    found = measure(subject, replace(logits[0], logits_TNC=mean_TNC), first.patterns, first.options.bootstrap)
    folder = first.options.log_dir / name / "robustness"
    folder.mkdir(parents=True, exist_ok=True)
    log.info("mean of %d models, written to %s: %s", len(targets), folder, ", ".join(write_results(found, folder)))
    return replace(first, subject=subject, run=None), found


def describe(measured: Sequence[tuple[Target, Results]]) -> str:
    """The results of one checkpoint, or of several side by side, then the baselines that ignore the sample."""
    (target, first), several = measured[0], len(measured) > 1
    subject, samples, spec = target.subject, counted(first["samples"], "sample"), target.store.dataset.spec
    one = " ".join([f"{subject.checkpoint} (sha256 {subject.checkpoint_sha256[:12]})", *subject.other_input])
    over = f"mean{'' if several else ' ± std'} over missing tables (seeds {', '.join(map(str, first['table_seeds']))})"
    baselines = [f"  {line}" for line in baseline_texts(first["baselines"], first["metric"])]
    found = [(target, Robustness.of(results, spec)) for target, results in measured]
    return "\n".join(
        [
            f"robustness of {counted(len(measured), 'checkpoint') if several else one}",
            f"  {first['task']} test, {samples}; {metric_text(first['metric'])}, {over}\n",
            *(_side_by_side(found, spec) if several else _matrices(found[0][1], spec)),
            *(["", "baselines that ignore the sample:", *baselines] if baselines else []),
        ]
    )


def _kinds(patterns: Iterable[Pattern]) -> dict[Pattern, str]:
    """The missing type of each pattern, followed by both_ratio if there are several or it is not 0.5."""
    several = len({pattern.both_ratio for pattern in patterns if pattern.missing_type == BOTH}) > 1
    return {p: f"{BOTH} {p.both_ratio:g}" if p.missing_type == BOTH and several else p.kind for p in patterns}


def _matrices(found: Robustness, spec: DatasetSpec) -> list[str]:
    """Tables of one checkpoint (ratios down, missing types across): metric, intervals, and F1 at the offset."""
    raw, metrics = found.raw, {name: spreads_of(name, [found], spec) for name in found.raw["metrics"]}
    texts = {"": {pattern: spread.estimate.text() for pattern, spread in metrics[raw["metric"]].items()}}
    if raw["confidence"]["resamples"]:
        ends = {pattern: cell["interval"] for pattern, cell in found.cells.items()}
        level = f"{per_cent(raw['confidence']['level'])} interval over test samples"
        texts[level] = {pattern: interval_text(each["low"], each["high"]) for pattern, each in ends.items()}
    if AT_OFFSET in metrics:
        texts[AT_OFFSET] = {pattern: spread.estimate.text() for pattern, spread in metrics[AT_OFFSET].items()}
    parts = []
    for title, by_pattern in texts.items():
        at = {(kind, pattern.ratio): by_pattern[pattern] for pattern, kind in _kinds(by_pattern).items()}
        kinds, ratios = dict.fromkeys(kind for kind, _ in at), sorted({ratio for _, ratio in at})
        rows = [[per_cent(ratio), *(at.get((kind, ratio), "–") for kind in kinds)] for ratio in ratios]
        parts += [f"\n{title}:\n"] if title else []
        parts.append(terminal_table(["missing", *kinds], rows, ">" * (1 + len(kinds))))
    return parts


def _side_by_side(found: Sequence[tuple[Target, Robustness]], spec: DatasetSpec) -> list[str]:
    """A block per missing type, a column per line of runs."""
    first, lines = found[0][1].raw, lines_of(found, lambda entry: entry[0].run)
    heads, rows = ["method", ""], [["name", ""], ["trained at", ""], ["seeds", ""]]
    for line in lines:
        subjects = [target.subject for target, _ in line.items]
        heads.append(" ".join(dict.fromkeys([subjects[0].method, *subjects[0].other_input, *line.differing(lines)])))
        rows[0].append(", ".join(dict.fromkeys(subject.exp_name for subject in subjects)))
        trained = subjects[0].train_pattern  # the same for all runs of a line
        rows[1].append("not known" if trained is None else str(Pattern(**trained)))
        rows[2].append(", ".join("not known" if one.train_seed is None else str(one.train_seed) for one in subjects))

    def block(metric: str, above: Sequence[list[str]] = ()) -> str:
        columns = [spreads_of(metric, [results for _, results in line.items], spec) for line in lines]
        over = [" or ".join(dict.fromkeys(spread.over for spread in each.values() if spread.over)) for each in columns]
        table: list[list[str] | None] = [*above, ["± over", "", *over]] if above else []
        patterns = sorted({pattern for each in columns for pattern in each}, key=lambda pattern: pattern.place(spec))
        last_kind = None
        for pattern, kind in _kinds(patterns).items():
            values = [each[pattern].estimate.text() if pattern in each else "–" for each in columns]
            row = [kind if kind != last_kind else "", per_cent(pattern.ratio), *values]
            table += [None, row] if kind != last_kind else [row]
            last_kind = kind
        return terminal_table(heads, table, "<" + ">" * (len(heads) - 1), repeated=2)

    tables = [block(first["metric"], rows)]
    if any(AT_OFFSET in results.raw["metrics"] for _, results in found):
        tables += [f"\n{AT_OFFSET}:\n", block(AT_OFFSET)]
    left_out = [str(target.subject.checkpoint) for line in lines for target, _ in line.repeats]
    return tables + ([f"\nnot counted, since another run has the seed: {', '.join(left_out)}"] if left_out else [])
