"""A training run, from its options to the test of its best checkpoint."""

import copy
import hashlib
import logging
import os
import time
from collections.abc import Collection
from contextlib import nullcontext
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import move_data_to_device

from clip.backbone import FrozenWeights
from clip.modules.classifier import MissingModalityClassifier
from clip.modules.fused import PLAIN
from clip.modules.method import Method
from clip.modules.neighbours import BANK
from clip.modules.no_prompts import NoPrompts
from clip.modules.registry import TRAIN_BACKBONES, method_class
from clip.trainable import freeze
from common.errors import CheckpointError, ConfigError, UserError
from common.files import atomic_path
from common.hashing import file_sha256
from common.messages import first_line
from common.strict_json import read_json
from config import AUTO, Options
from engine.cached_features import cache_features, has_constant_features, remember_training_split
from engine.callbacks import Checkpoints
from engine.checkpoint import (
    Checkpoint,
    ModelSpec,
    TokenizerUsed,
    TrainingRecord,
    build_classifier,
    check_backbone,
    check_classes,
    check_tokenizer,
    describe,
    load_saved_state,
    read_checkpoint,
    restore_classifier,
    saved_names,
)
from engine.contents import contents_of_data
from engine.cuda_graphs import captured, use_ops
from engine.exported import weights_file
from engine.families import family_of
from engine.neighbour_accuracy import NeighbourAccuracy
from engine.open_model import COMPUTE_TYPES, reading_texts
from engine.processes import LOST, ending_together
from engine.tasks import head_name, task_of
from engine.teacher import open_teacher, soft_labels
from engine.trainer import make_trainer
from engine.training import MINUS_LOSS, FinetuneModule, model_input
from runs.evaluation import backbone_choice, check_measurable, open_data, test
from runs.resume import check_length, check_resume, differing_options, find_progress, log_differences, training_lock
from runs.run_reader import as_written_by_run
from runs.start import commit, config_content, log_device, log_remarks, start_folder
from runs.targets import as_trained
from vilt.datamodules import MissingModalityData, dead_worker
from vilt.datasets.kinds import InputFormat
from vilt.datasets.open_spec import open_spec
from vilt.datasets.specs import EVERY_DATASET

log = logging.getLogger("rep")


class Opened(NamedTuple):
    """Everything that a training run reads."""

    options: Options
    """The options; backbone and tokenizer are those of the checkpoint in `load_path`, unless others are given."""
    start: Checkpoint | None  # the checkpoint in `load_path`
    backbone: FrozenWeights
    inputs: InputFormat
    data: MissingModalityData
    contents: dict[str, str]  # their SHA-256


def train(options: Options, given: Collection[str] = ()) -> dict[str, float]:
    """Trains a model, or finishes an earlier run of the same training; returns the test metrics of its best checkpoint.

    Args:
        given: names of the options set on the command line.
    """
    name = f"{options.exp_name}_seed{options.seed}"
    if options.resume_from != AUTO:
        return train_from(options, name, given=given)
    custom = open_spec(options.task, options.data_root, options.splits).custom
    parent = options.log_dir / name
    writes = not options.fast_dev_run
    with training_lock(parent, config_content(options, custom)) if writes else nullcontext():
        opened = open_training(options, given)
        our_config, any_precision = config_content(opened.options, custom), "precision" not in given
        progress = find_progress(parent, our_config, opened.contents, any_precision=any_precision)
        if progress.finished is not None:
            log.info("resume_from=auto: nothing left to do, since %s is finished", progress.finished)
            path = progress.finished / "test_results.json"
            with as_written_by_run(path):
                return read_json(path)["metrics"] if options.test_after_fit else {}
        opened = opened._replace(options=replace(opened.options, resume_from=progress.checkpoint))
        return train_from(options, name, given=given, opened=opened)


def starting_point(options: Options, given: Collection[str]) -> tuple[Options, Checkpoint | None, Any]:
    """Reads `load_path`. Returns the options with its backbone and tokenizer, unless others are given; the checkpoint,
    if its memory is used; and the architecture it was trained on."""
    start = read_checkpoint(options.load_paths[0]) if options.load_paths else None
    trained_on = None
    if start is not None and EVERY_DATASET[start.spec.task].family != EVERY_DATASET[options.task].family:
        raise CheckpointError(
            f"load_path={start.path}: expected a model for {options.task}, found one of {start.spec.task}"
        )
    if start is not None and start.spec.method.prompt_type in TRAIN_BACKBONES and not is_warm_start(options, start):
        if options.finetune_first:
            raise ConfigError(f"finetune_first: expected a model whose head fits, found the backbone {start.path}")
        options, start = replace(options, vit=str(options.load_path)), None  # only its backbone is used
    elif start is not None and not start.published and "vit" not in given:
        options, trained_on = replace(options, vit=start.backbone_place), start.spec.architecture
    if start is not None and start.tokenizer is not None and "tokenizer" not in given:
        options = replace(options, tokenizer=start.tokenizer.option)
    return options, start, trained_on


def is_warm_start(options: Options, start: Checkpoint) -> bool:
    """Whether training of the whole backbone can start from all of `start`, since its data had the same shapes."""
    choice = backbone_choice(options, {"vit"})
    return options.prompt_type in TRAIN_BACKBONES and family_of(options.task).fits(start.spec.architecture, choice)


def open_training(options: Options, given: Collection[str]) -> Opened:
    """Opens everything that a training run reads. The arguments are those of `train`."""
    options, start, trained_on = starting_point(options, given)
    family, choice = family_of(options.task), backbone_choice(options, {"vit"})
    backbone = family.load(choice, trained_on)
    options = fit_depths(options, given, backbone.architecture)
    inputs = reading_texts(family.inputs(choice, backbone.architecture), options.method())
    check_model(options, backbone.architecture)
    data = open_data(options, inputs)
    contents = {} if options.fast_dev_run and options.resume_from is None else contents_of_data(data)
    architecture = hashlib.sha256(repr(backbone.architecture).encode()).hexdigest()  # includes image preprocessing
    contents |= {"teacher": file_sha256(weights_file(options.teacher))} if options.teacher is not None else {}
    contents |= {"backbone": backbone.sha256, "architecture": architecture, "tokenizer": inputs.fingerprint}
    return Opened(options, start, backbone, inputs, data, contents | ({"load_path": start.sha256} if start else {}))


def check_model(options: Options, architecture: Any) -> None:
    """Raises ConfigError if the model's options do not fit each other or the backbone, before the data are read."""
    custom = open_spec(options.task, options.data_root, options.splits).custom
    try:
        with torch.device("meta"):
            model = build_classifier(ModelSpec(options.task, options.method(), architecture, options.head, custom))
        model.head.trained_on(options.missing_type["train"])
    except ValueError as error:
        raise ConfigError(str(error)) from error


def fit_depths(options: Options, given: Collection[str], architecture: Any) -> Options:
    """Fits depths that are not `given` to the backbone: for sensors always, else if it has too few blocks for them.

    Half of the blocks get slots of their own, and up to as many a replay, as in the published backbone.
    """
    family = EVERY_DATASET[options.task].family
    with torch.device("meta"):
        backbone = family_of(options.task).build(architecture)
    depth = min(place.depth for place in backbone.places.values())
    memory, replay = options.memory_depth, options.replay_depth
    if family == "sensors" and options.prompt_type == "rep" and "memory_depth" not in given:
        memory = max(1, depth // 2)
    if memory + replay > depth:
        try:
            kind = method_class(options.prompt_type, family)
            kind(backbone.places, backbone.embed_dim, replace(options, memory_depth=memory).method())
            return options  # a method without depths
        except ValueError:
            if "memory_depth" not in given:
                memory = max(1, min(memory, depth // 2, depth - replay if "replay_depth" in given else depth))
            if "replay_depth" not in given:
                replay = min(replay, max(1, depth - memory))
    fitted = replace(options, memory_depth=memory, replay_depth=replay)
    for name in ("memory_depth", "replay_depth"):
        if (ours := getattr(fitted, name)) != (default := getattr(options, name)):
            log.info("%s=%d, since the backbone has %d blocks; the default is %d", name, ours, depth, default)
    return fitted


def train_from(
    options: Options, name: str, *callbacks: pl.Callback, given: Collection[str] = (), opened: Opened | None = None
) -> dict[str, float]:
    """Runs a training in a new run folder below `name`, from the beginning or from the checkpoint `resume_from`."""
    log_device(options)
    options, start, backbone, inputs, data, contents = opened or open_training(options, given)
    pl.seed_everything(options.seed, workers=True, verbose=False)
    family, custom = family_of(options.task), data.spec.custom
    if not options.fast_dev_run:
        log_remarks(options, data.datasets)
    task = task_of(options.task, custom)
    check_measurable(data, task)
    spec = ModelSpec(options.task, options.method(), backbone.architecture, options.head, custom)
    classifier = build_classifier(spec)
    classifier.head.trained_on(options.missing_type["train"])
    log.info("parameters:\n%s", freeze(classifier, options.task))
    backbone.load_into(classifier.model)
    classifier.method.start_from(family.start_embeddings(backbone, inputs))
    classifier.method.start_on(classifier.model)
    train_data = data.datasets["train"]
    if options.resume_from is not None:
        resumed = read_checkpoint(Path(options.resume_from))
        check_resume(resumed, spec, backbone, inputs.fingerprint, train_data, contents)
        check_length(resumed.path, options.max_epoch, options.max_steps)
        options = as_trained(options, [resumed], given)
        load_saved_state(classifier, resumed.state, f"resume_from={resumed.path}")
        log_differences(resumed.path, config_content(options, custom))
    elif start is not None:
        check_tokenizer(start, inputs.fingerprint)
        if options.finetune_first:
            check_classes(start, train_data)
        warm_start(classifier, spec, start, backbone, options.published_seed, with_head=options.finetune_first)

    teacher = None
    if options.teacher is not None:  # before anything that takes long
        if type(classifier.method).augment is not Method.augment:
            raise ConfigError(f"teacher: expected None with prompt_type={options.prompt_type}, which mixes samples")
        teacher = open_teacher(options.teacher, options, train_data, inputs)
    classifier.compute(COMPUTE_TYPES[options.precision], checkpointing=options.activation_checkpointing)
    has_seen = start is not None and start.spec.method.prompt_type == options.prompt_type  # unlike a start of `none`
    if classifier.method.sees_training_split and options.resume_from is None and not has_seen:
        see_training_split(options, classifier, data)
    if has_constant_features(classifier) and (options.max_epoch > 1 or options.neighbours) and not options.fast_dev_run:
        cache_features(data, backbone, inputs.fingerprint, options.precision, own_device(options))
        if options.resume_from is None:
            remember_training_split(classifier, data)
    taught = None
    if teacher is not None:
        taught = soft_labels(*teacher, options.precision, data, backbone, own_device(options))
    classifier.train()  # Lightning does not set the mode; a backbone keeps its frozen parts in evaluation mode
    folder = start_folder(options, name, custom, contents) if not options.fast_dev_run else None
    if folder is not None and backbone.left:
        write_entry_names(folder / "taken_over.txt", backbone, classifier)
    skip_bad_steps = options.skip_bad_steps if COMPUTE_TYPES[options.precision] == torch.float16 else 0
    tokenizer = TokenizerUsed(options.tokenizer, inputs.fingerprint) if inputs.tokenize is not None else None
    model_facts = (spec, backbone.name, backbone.sha256, train_data.class_names(), tokenizer)
    pattern = options.pattern("train")
    trained_at = (pattern.missing_type, pattern.ratio, pattern.both_ratio, pattern.seed, pattern.drawing)
    description = describe(*model_facts, contents, training=TrainingRecord(*trained_at, commit(), options.precision))
    settings = options.optimizer_settings()
    module = FinetuneModule(classifier, spec, description, settings, options.seed, skip_bad_steps)
    module.soft_labels, plain = taught, (module.step, module.evaluate)
    batches = data.steps_per_epoch(options.processes) * options.max_epoch
    if options.max_steps is not None:
        batches = min(batches, options.max_steps * options.accumulation)
    if options.fast_dev_run or train_data.cached is not None:  # steps too short for graph capture to pay
        batches = 0
    module.step, module.evaluate = captured(*plain, classifier, options, batches)
    # Processes without a folder write nothing, but take part in collective calls when the first one writes.
    monitor = MINUS_LOSS if module.pretrains else task.monitor
    checkpoints = Checkpoints(folder or options.log_dir, f"val/{monitor}")
    if module.pretrains and not options.fast_dev_run:
        callbacks += (NeighbourAccuracy(),)
    trainer = make_trainer(options, folder, data.steps_per_epoch(options.processes), checkpoints, *callbacks)
    with data.report_dead_workers(), ending_together(trainer):
        began = time.monotonic()
        try:
            state = None if options.fast_dev_run else options.resume_from  # the weights are loaded already
            trainer.fit(module, datamodule=data, ckpt_path=state, weights_only=True)
        except Exception as error:
            # Errors unrelated to the checkpoint: a full disk or GPU, a worker or another process that died.
            elsewhere = isinstance(error, (UserError, OSError, torch.OutOfMemoryError)) or LOST.search(str(error))
            if options.resume_from is None or checkpoints.training or elsewhere or dead_worker(error):
                raise
            raise CheckpointError(
                f"resume_from={options.resume_from}: cannot be resumed: {first_line(error)}"
            ) from error
        seconds = time.monotonic() - began
        module.step, module.evaluate = plain  # captured graphs would read weights at addresses no longer valid
        use_ops(classifier, PLAIN)
        if options.fast_dev_run:
            log.info("fast_dev_run: one batch of each split passed; nothing was written")
            return {}
        if checkpoints.best is None:
            why = f"no validation of a trained model gave a defined {checkpoints.monitor}"
            log.warning("no best checkpoint, since %s; nothing is tested", why)
            return {}
        best_path = trainer.strategy.broadcast(checkpoints.best_path)
        log.info("best %s %.4f: %s", checkpoints.monitor, checkpoints.best["score"], best_path)
        if not options.test_after_fit:
            return {}
        checkpoint = read_checkpoint(best_path)
        load_saved_state(classifier, checkpoint.state, str(best_path))
        training = {
            "missing_in_training": data.training_missing,
            "trained_parameters": sum(p.numel() for p in classifier.parameters() if p.requires_grad),
            "training_seconds": None if options.resume_from else round(seconds, 1),
        }
        return test(options, trainer, module, data, checkpoint, folder, training)


def write_entry_names(path: Path, backbone: FrozenWeights, classifier: MissingModalityClassifier) -> None:
    """Lists in a file which entries were taken over from a pretrained model, are new, or were left out."""
    names = [(name, name.removeprefix("model.") in backbone.state) for name in classifier.state_dict()]
    groups = {
        "taken over": [name for name, is_taken in names if is_taken],
        "new": [name for name, is_taken in names if not is_taken],
        "left": backbone.left,
    }
    with atomic_path(path) as temporary:
        temporary.write_text("".join(f"{group}\t{name}\n" for group, each in groups.items() for name in each), "utf-8")
    counts = ", ".join(f"{len(each)} {group}" for group, each in groups.items())
    log.info("entries of %s: %s; listed in %s", backbone.name, counts, path)


def compute_features(options: Options, given: Collection[str]) -> None:
    """Computes and caches the frozen towers' features of every input of the splits, whatever the missing tables say.

    Raises:
        OSError: the files cannot be written.
    """
    log_device(options)
    opened = open_training(options, given)
    computed = opened.inputs.fingerprint, options.precision, own_device(options)
    cache_features(opened.data, opened.backbone, *computed, must_keep=True)


def own_device(options: Options) -> torch.device:
    """The device that this process computes on."""
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if options.num_gpus else torch.device("cpu")


def see_training_split(options: Options, classifier: MissingModalityClassifier, data: MissingModalityData) -> None:
    """Passes the training split, with its missing table applied, to the method; every process passes all samples."""
    log.info("%s: reads the whole training split before training", options.prompt_type)
    device = own_device(options)
    data = copy.copy(data)
    data.datasets = {**data.datasets, "train": data.datasets["train"].without_draws()}
    with data.report_dead_workers():
        batches = islice(data.train_dataloader(), 1 if options.fast_dev_run else None)
        classifier.to(device)
        classifier.method.see(classifier.model, (model_input(move_data_to_device(batch, device)) for batch in batches))
        classifier.to("cpu")


def warm_start(
    classifier: MissingModalityClassifier,
    spec: ModelSpec,
    checkpoint: Checkpoint,
    backbone: FrozenWeights,
    published_seed: int,
    *,
    with_head: bool,
) -> None:
    """Loads the memory of `checkpoint`, and with `with_head` its head, and logs what was loaded.

    Raises:
        CheckpointError: the memory does not fit, or was trained on another backbone.
    """
    if not checkpoint.published:
        check_backbone(checkpoint, backbone)
    start = restore_classifier(checkpoint, None if checkpoint.published else backbone, published_seed)
    heads = tuple(f"{head_name(task)}." for task in EVERY_DATASET)
    own, theirs = classifier.state_dict(), start.state_dict()
    frozen = (theirs.keys() & own.keys()) - set(saved_names(start)) - set(saved_names(classifier))
    for name in sorted(frozen) if checkpoint.published else []:
        if own[name].shape != theirs[name].shape or not torch.allclose(own[name], theirs[name], rtol=0.01, atol=1e-3):
            raise CheckpointError(
                f"load_path={checkpoint.path}: its backbone differs from vit={backbone.name} in {name}"
            )
    # The parts that REP as described adds to the released model start as the identity; other checkpoints lack them.
    method = classifier.method
    added = tuple(f"model.{method.attribute}.{beginning}" for beginning in method.identity_at_init)
    absent = {name for name in saved_names(classifier) if name.startswith(added)} - set(saved_names(start))
    if type(start.method) is NoPrompts:  # it has only the head and, if they were trained, the ends of the towers
        absent |= {name for name in saved_names(classifier) if name.startswith(f"model.{method.attribute}.")}
    candidates = [name for name in saved_names(classifier) if name not in absent]
    left_out = ("neighbours.", *heads)
    if with_head:  # and the gates of neighbours; the neighbours themselves are the start's own training samples
        left_out = ("neighbours.",) if start.neighbours is None else tuple(f"neighbours.{name}" for name in BANK)
    wanted = [name for name in candidates if not name.startswith(left_out)]
    misfits = [name for name in wanted if name not in theirs or own[name].shape != theirs[name].shape]
    if misfits:
        raise CheckpointError(
            f"load_path={checkpoint.path}: {len(misfits)} entries do not fit this model, for example {misfits[0]}: a "
            f"run with other options: {differing_options(checkpoint.spec, spec)}"
        )
    with torch.no_grad():
        for name in wanted:
            own[name].copy_(theirs[name])
    log.info(
        "warm start from %s: %d entries loaded, %s",
        checkpoint.path,
        len([name for name in wanted if not name.startswith(heads)]),
        "the head too" if with_head else "the head starts from random values (finetune_first=True loads it too)",
    )
