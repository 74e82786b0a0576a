"""Evaluates checkpoints on the test split, and opens models and data for that."""

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch

from clip.modules.classifier import MissingModalityClassifier
from common.errors import ConfigError, DataError
from common.messages import listed
from common.strict_json import write_json
from common.text import AT_OFFSET, baseline_texts, counted, figure, per_cent
from config import Options
from engine.baselines import baselines
from engine.checkpoint import Checkpoint, check_classes, read_checkpoint
from engine.contents import contents_of_data, other_contents
from engine.decision import with_offset
from engine.ensemble import merged_checkpoint, open_models
from engine.families import BackboneChoice
from engine.open_model import COMPUTE_TYPES
from engine.processes import ending_together
from engine.robustness import by_missing_type
from engine.tasks import Task, with_published_f1
from engine.trainer import make_trainer
from engine.training import FinetuneModule
from runs.comparable import other_input
from runs.start import log_device, start_folder
from runs.targets import as_trained, check_agreement, drawn_as_trained, with_model_of
from vilt.datamodules import MissingModalityData
from vilt.datasets.arrow_dataset import ArrowDataset
from vilt.datasets.kinds import InputFormat
from vilt.datasets.open_spec import open_spec
from vilt.datasets.specs import Split
from vilt.missing_tables import counts_text, type_counts

log = logging.getLogger("rep")


def evaluate(options: Options, given: set[str]) -> dict[str, float]:
    """Evaluates `load_path` with the model's options from the checkpoint, which `given` ones must not contradict.

    Several checkpoints are evaluated as one model that averages their logits; the first one's options are recorded.
    """
    assert options.load_paths
    arrow = open_spec(options.task, options.data_root, options.splits)
    members = [read_checkpoint(path) for path in options.load_paths]
    options = drawn_as_trained(as_trained(options, members, given), members, given)
    log_device(options)
    for checkpoint in members:
        check_agreement(options, checkpoint, given)
        check_classes(checkpoint, ArrowDataset(arrow, options.data_root, "test"))  # before the heavy work
    checkpoint = merged_checkpoint(members)
    classifier, data = open_evaluation(options, members, given)
    name = options.test_exp_name or (
        f"{options.exp_name}_test_{options.missing_type['test']}_{options.missing_ratio['test']:g}"
    )
    custom = data.spec.custom
    contents = contents_of_data(data)
    if other := other_contents(checkpoint.contents, contents, *(checkpoint.contents.keys() - {"data of test"})):
        log.warning("%s: the test set differs from its run's: %s", checkpoint.path, ", ".join(other))
    folder = start_folder(with_model_of(checkpoint, options, given), name, custom, contents)
    trainer = make_trainer(options, folder, steps_per_epoch=1)
    module = FinetuneModule(classifier, replace(checkpoint.spec, custom=custom))
    check_measurable(data, module.task)
    with data.report_dead_workers(), ending_together(trainer):
        return test(options, trainer, module, data, checkpoint, folder)


def open_evaluation(
    options: Options, checkpoints: Sequence[Checkpoint], given: set[str]
) -> tuple[MissingModalityClassifier, MissingModalityData]:
    """Opens the model of `checkpoints`, on the backbones they were trained on, and its test split."""
    classifier, inputs = open_models(checkpoints, backbone_choice(options, given), options.vit)
    classifier.compute(COMPUTE_TYPES[options.precision], checkpointing=options.activation_checkpointing)
    return classifier, open_data(options, inputs)


def backbone_choice(options: Options, given: set[str]) -> BackboneChoice:
    """The user's choice of a backbone; `vit` counts only if it is `given`."""
    vit = options.vit if "vit" in given else None
    file_options = options.vit_activation, options.tokenizer, options.trust_backbone, options.published_seed
    data_options = options.task, options.data_root, options.network, options.seed
    return BackboneChoice(vit, *file_options, options.image_size, *data_options)


def open_data(options: Options, inputs: InputFormat) -> MissingModalityData:
    """Opens the splits that this run reads.

    Raises:
        ConfigError: a split has fewer samples than there are processes.
    """
    data = MissingModalityData(options.data_settings(), options.splits, inputs)
    for split, dataset in data.datasets.items():
        check_samples(options, split, dataset)
    log.info("data of %s:\n%s", options.data_root, data.describe())
    return data


def check_samples(options: Options, split: Split, dataset: ArrowDataset) -> None:
    """Raises ConfigError if a split has fewer samples than there are processes."""
    if (samples := len(dataset.chosen)) < options.processes:
        few = split == "train" and options.label_ratio < 1
        remedy = "a larger label_ratio" if few else "fewer processes (num_gpus, num_nodes or cpu_processes)"
        raise ConfigError(
            f"{dataset.path}: expected at least one sample for each of the {options.processes} processes, found "
            f"{samples} in {split}; use {remedy}"
        )


def check_measurable(data: MissingModalityData, task: Task) -> None:
    """Warns of splits on which the task's metric is always undefined, such as AUROC if only one class occurs.

    Raises:
        DataError: the validation split is one of them; the best model cannot be chosen.
    """
    for split, dataset in data.datasets.items():
        labels = torch.from_numpy(np.asarray(dataset.label_of_sample[dataset.chosen]))
        anything = torch.arange(len(labels) * task.n_classes).reshape(len(labels), task.n_classes) * 0.1
        if not math.isnan(task.metrics(anything, labels)[task.monitor]):
            continue
        why = f"{dataset.path}: no sample is of class {listed(dataset.absent_classes())}"
        said = f"{why}, so {split}/{task.monitor} is undefined"
        if split == "val":
            raise DataError(f"{said} and cannot choose the best model; expected samples of all classes in each split")
        log.warning("%s and not reported", said)


def test(
    options: Options,
    trainer: pl.Trainer,
    module: FinetuneModule,
    data: MissingModalityData,
    checkpoint: Checkpoint,
    folder: Path | None,
    training: dict[str, Any] | None = None,
) -> dict[str, float]:
    """Evaluates the test split, prints the results and writes them, with `training`, to `test_results.json`."""
    started, task = time.monotonic(), module.task
    module.task = with_offset(task, checkpoint.offset)
    if options.published_f1:
        module.task = with_published_f1(module.task)
    trainer.test(module, datamodule=data, verbose=False)
    dataset = data.datasets["test"]
    pattern, types_N = data.patterns["test"], dataset.missing_type_of_sample
    assert module.tested is not None
    by_type = by_missing_type(module.task, data.spec.type_names, types_N, *module.tested)
    found = baselines(task, torch.from_numpy(dataset.label_of_sample), dataset.class_names())
    result = {
        "task": options.task,
        "split": "test",
        "samples": len(module.tested[0]),
        "rows": dataset.n_rows,
        "missing": type_counts(types_N, data.spec.type_names),
        "by_missing_type": by_type,
        "missing_pattern": pattern.recorded(),
        "metrics": module.test_metrics,
        "offset": checkpoint.offset,
        "other_input": (other := other_input(asdict(checkpoint.spec.method))),
        "baselines": found,
        "checkpoint": str(checkpoint.path),
        "checkpoint_sha256": checkpoint.sha256,
        "precision": options.precision,
        "seconds": round(time.monotonic() - started, 1),
        **(training or {}),
    }
    if trainer.is_global_zero:
        assert folder is not None
        write_json(folder / "test_results.json", result)
        counts = ", ".join(counts_text(result["missing"]))
        print(" ".join([f"\ntest of {checkpoint.path} (sha256 {checkpoint.sha256[:12]})", *other]))
        print(
            f"  {options.task} test, {per_cent(pattern.ratio)} missing ({pattern.missing_type}), seed {pattern.seed}\n"
            f"  {counted(result['samples'], 'sample')}: {counts}"
        )
        for metric, value in module.test_metrics.items():
            print(f"  test/{metric:<19} {figure(value)}")
        if AT_OFFSET in module.test_metrics:
            print(f"  offset of the logits, chosen on validation: {checkpoint.offset:+.4f}")
        elif data.spec.multilabel:
            print("  no offset of the logits was chosen on validation: the threshold is a probability of 1/2")
        for name, results in by_type.items() if len(by_type) > 1 else ():
            shown = figure(results[module.task.monitor])
            print(f"  {name}, {counted(results['samples'], 'sample')}: {module.task.monitor} {shown}")
        print("".join(f"  {text}\n" for text in baseline_texts(found, module.task.monitor)), end="")
        print(f"  written to {folder / 'test_results.json'}\n")
    return module.test_metrics
