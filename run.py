"""Training and evaluation of REP: `python run.py with task_finetune_mmimdb data_root=… exp_name=…`.

`python run.py robustness with load_path=…` evaluates at every missing type and ratio; `python run.py runs` lists runs;
`python run.py report with runs=…` writes a page about them; `python run.py print_config` shows the options;
`python run.py doctor with …` looks, before a long run, whether all that it needs is there and whole.
Exit status: 0 done, 2 something the user can mend, 1 a fault of ours, 130 Ctrl-C, 143 SIGTERM.
"""

import logging
import sys
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_utilities.core.rank_zero import rank_zero_only
from tqdm import tqdm

from clip.backbone import Backbone, load_backbone
from clip.callbacks import Checkpoints
from clip.checkpoint import (
    Checkpoint,
    ModelSpec,
    TokenizerUsed,
    build_classifier,
    check_backbone,
    check_classes,
    check_tokenizer,
    kept_names,
    load_kept_state,
    read_checkpoint,
    restore_classifier,
)
from clip.ending import (
    DONE,
    INTERRUPTED,
    USER_ERROR,
    end_with_our_fault,
    end_with_signal,
    end_with_user_error,
)
from clip.interruption import Stopped, end_loaders, stopping_on_signals
from clip.logit_store import LogitModule, encode
from clip.modules.classifier import MissingModalityClassifier
from clip.open_model import COMPUTE_TYPES, BackboneChoice, open_model, tokenizer_for
from clip.predict import Predictor, describe_predictions, read_items, write_predictions
from clip.processes import OtherProcessError, ending_together
from clip.published_options import with_names_of_here
from clip.resume import AUTO, alone, find_progress, say_differences
from clip.robustness import Robustness, measure, write_results
from clip.robustness_text import describe_one, describe_several
from clip.run_folder import environment, make_run_folder, read_json, write_json
from clip.run_table import describe_runs, list_runs, sort_runs, write_runs
from clip.tasks import TASKS, head_name, task_of
from clip.tokenizer import ClipTokenizer
from clip.trainable import freeze
from clip.trainer import make_trainer, set_up_logging
from clip.training import FinetuneModule
from common.errors import CheckpointError, CheckupError, ConfigError, UserError, machine_error
from common.messages import first_line
from config import (
    EX,
    ConfigAddedError,
    Options,
    SacredError,
    check,
    check_command_line,
    options_in_files,
    read_options,
    read_with_machine,
    unknown_option,
)
from sweep.command import run_sweep
from targets import Target, check_agreement, open_targets, with_model_of
from vilt.datamodules import MissingModalityData
from vilt.datasets.arrow_dataset import ArrowDataset
from vilt.datasets.custom import CUSTOM, CustomData
from vilt.datasets.open_spec import open_spec
from vilt.missing_tables import TYPE_NAMES, type_counts

log = logging.getLogger("rep")
EX.doc = __doc__  # for `run.py --help`

PREDICTION_OPTIONS = (
    *("load_path", "input", "output", "per_gpu_batchsize"),
    *("vit", "vit_activation", "tokenizer", "trust_backbone", "published_seed"),
)


@EX.main
def main(_config: dict[str, Any], _run: Any) -> dict[str, float]:
    """Trains, or evaluates with test_only=True; returns the test metrics."""
    options, given = check(_config), given_options(_run)
    written = written_options(_run)  # a file may be the config.json of a run, which has all options
    if of_sweeps := sorted(n for n in written if n.startswith("sweep_") or n in ("search", "search_trials")):
        raise ConfigError(f"{of_sweeps[0]}: for many runs; expected `python run.py sweep with …`")
    set_up_logging()
    return evaluate(options, given) if options.test_only else train(options)


@EX.command
def robustness(_config: dict[str, Any], _run: Any) -> None:
    """Evaluates load_path at all robustness_types and robustness_ratios, from three passes over the test split."""
    set_up_logging()
    given = given_options(_run)
    results = [measure_target(target, given) for target in open_targets(_config, given)]
    whole = [result for result in results if result is not None]
    if whole:
        print(f"\n{describe_several(whole) if len(whole) > 1 else describe_one(whole[0])}\n")


@EX.command(unobserved=True)
def runs(_config: dict[str, Any]) -> None:
    """Prints the table of all runs below log_dir, sorted by runs_sort, and writes it to log_dir/runs.csv."""
    options = read_options(_config, ["log_dir", "runs_sort"])
    log_dir = options["log_dir"]
    rows = sort_runs(list_runs(log_dir), options["runs_sort"])
    write_runs(rows, log_dir / "runs.csv")
    print(f"\n{describe_runs(rows, log_dir)}\nwritten to {log_dir / 'runs.csv'}\n")


@EX.command(unobserved=True)
def report(_config: dict[str, Any]) -> None:
    """Writes a page, with tables and figures, about the runs in and below the folders `runs`, into the folder `out`."""
    from report import make_report  # draws with matplotlib, which nothing else needs

    options = read_options(_config, ["runs", "out"])
    set_up_logging()
    print(f"\nwritten to {make_report(options['runs'], options['out'])}\n")


@EX.command(unobserved=True)
def predict(_config: dict[str, Any], _run: Any) -> None:
    """Predicts classes of the images and texts that `input` names with load_path, and writes them to `output`."""
    options = read_with_machine(_config, PREDICTION_OPTIONS)
    if options["load_path"] is None or options["input"] is None:
        raise ConfigError(
            "predict: expected a checkpoint and samples, as in load_path=result/…/best.ckpt input=samples.csv"
        )
    set_up_logging()
    items = read_items(options["input"])
    checkpoint = read_checkpoint(options["load_path"])
    choice = backbone_choice(options, given_options(_run))
    classifier, tokenizer = open_model(checkpoint, choice, options["vit"])
    device = torch.device("cuda" if options["num_gpus"] else "cpu")
    predictor = Predictor(checkpoint, classifier, tokenizer, device, options["precision"])
    batch_size, workers = options["per_gpu_batchsize"], options["num_workers"]
    predictions = predictor.predict_items(items, batch_size=batch_size, workers=workers)
    shown = tqdm(predictions, "predicting", len(items), disable=not sys.stderr.isatty())
    first = write_predictions(options["output"], items, shown, predictor)
    print(f"\n{describe_predictions(items, first)}\n\n  {len(items):,} predictions, written to {options['output']}\n")


@EX.command(unobserved=True)
def doctor(_config: dict[str, Any]) -> None:
    """Checks installation, machine, dataset, weights and one training step: a line each, with ok, warn or FAIL."""
    from doctor import examine

    set_up_logging()
    findings = []
    for finding in examine(_config, tokenizer_for, set_computation):
        print(finding.line(), flush=True)
        findings.append(finding)
    failed = sum(finding.level == "FAIL" for finding in findings)
    if failed:
        raise CheckupError(f"{failed} of {len(findings)} checks failed")


def given_options(sacred_run: Any) -> set[str]:
    """Names of the options that the command line sets, itself or in the .json files that it names."""
    return written_options(sacred_run) | set(options_in_files(sacred_run.meta_info["options"]["UPDATE"]))


def written_options(sacred_run: Any) -> set[str]:
    """Names of the options that the command line itself sets."""
    updates = [update for update in sacred_run.meta_info["options"]["UPDATE"] if "=" in update]
    return {update.partition("=")[0].partition(".")[0].strip() for update in updates}


@EX.command
def sweep(_config: dict[str, Any], _run: Any, search: Any, sweep_over: Any, sweep_slurm: Any) -> None:
    """Trains and evaluates a grid of missing patterns and seeds, or searches for good values of options.

    The last arguments are there so that Sacred lets entries be added to them; they are in `_config` too.
    """
    set_up_logging()
    run_sweep(_config, _run.meta_info["options"]["UPDATE"])


def train(options: Options) -> dict[str, float]:
    """A training run, or what is left of it; the metrics of its best checkpoint on the test split."""
    name = f"{options.exp_name}_seed{options.seed}"
    if options.resume_from != AUTO:
        return train_from(options, name)
    custom = open_spec(options.task, options.data_root, options.splits).custom
    what = (options.log_dir / name, described(options, custom), options.per_gpu_batchsize * options.processes)
    with nullcontext() if options.fast_dev_run else alone(*what):  # which would write a lock
        progress = find_progress(*what)
        if progress.finished is not None:
            log.info("resume_from=auto: nothing is left to do: %s is finished", progress.finished)
            return read_json(progress.finished / "test_results.json")["metrics"] if options.test_after_fit else {}
        return train_from(replace(options, resume_from=progress.checkpoint), name)


def train_from(options: Options, name: str) -> dict[str, float]:
    """A training run in its own folder, `name`, from its start or from the checkpoint `resume_from`."""
    pl.seed_everything(options.seed, workers=True, verbose=False)
    say_device(options)
    backbone = load_backbone(options.vit, trust=options.trust_backbone, activation=options.vit_activation)
    tokenizer = tokenizer_for(options.tokenizer, options.vit, backbone.architecture.vocab_size)
    data = open_data(options, backbone.architecture.image_size, tokenizer)
    custom = data.spec.custom
    task = task_of(options.task, custom)
    spec = ModelSpec(options.task, options.method(), backbone.architecture, options.head, custom)
    try:
        classifier = build_classifier(spec)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    log.info("parameters:\n%s", freeze(classifier, options.task))
    backbone.load_into(classifier.model)
    token_embedding = backbone.state["text_encoder.token_embedding.weight"]
    classifier.method.start_from(
        {"image": backbone.state["image_encoder.class_embedding"], "text": token_embedding[tokenizer.end_id]}
    )
    if options.resume_from is not None:
        resumed = read_checkpoint(Path(options.resume_from))
        check_resume(resumed, spec, backbone, tokenizer, data.datasets["train"])
        load_kept_state(classifier, resumed.state, f"resume_from={resumed.path}")
        say_differences(resumed.path, described(options, custom))
    elif options.load_path is not None:
        start = read_checkpoint(options.load_path)
        if options.finetune_first:
            check_classes(start, data.datasets["train"])
        warm_start(classifier, start, backbone, options.published_seed, with_head=options.finetune_first)

    set_computation(options, classifier)
    folder = start_folder(options, name, custom) if not options.fast_dev_run else None
    skip_bad_steps = options.skip_bad_steps if COMPUTE_TYPES[options.precision] == torch.float16 else 0
    module = FinetuneModule(
        classifier,
        spec,
        (options.vit, backbone.sha256),
        options.optimizer_settings(),
        options.seed,
        skip_bad_steps,
        data.datasets["train"].class_names(),
        TokenizerUsed(options.tokenizer, tokenizer.fingerprint),
    )
    # Processes without the folder write nothing, but take part in writing.
    checkpoints = Checkpoints(folder or options.log_dir, f"val/{task.monitor}")
    trainer = make_trainer(options, folder, data.steps_per_epoch(options.processes), checkpoints)
    with data.naming_dead_workers(), ending_together(trainer):
        began = time.monotonic()
        try:
            trainer.fit(module, datamodule=data, ckpt_path=options.resume_from, weights_only=True)
        except Exception as error:
            if options.resume_from is None or checkpoints.training or isinstance(error, UserError):
                raise
            raise CheckpointError(
                f"resume_from={options.resume_from}: not to be resumed: {first_line(error)}"
            ) from error
        seconds = time.monotonic() - began
        if options.fast_dev_run:
            log.info("fast_dev_run: one batch of everything went through; nothing was written")
            return {}
        if checkpoints.best is None:
            log.warning("no validation took place, so that there is no best checkpoint and nothing is tested")
            return {}
        best_path = trainer.strategy.broadcast(checkpoints.best_path)
        log.info("best %s %.4f: %s", checkpoints.monitor, checkpoints.best["score"], best_path)
        if not options.test_after_fit:
            return {}
        checkpoint = read_checkpoint(best_path)
        load_kept_state(classifier, checkpoint.state, str(best_path))
        training = {
            "trained_parameters": sum(p.numel() for p in classifier.parameters() if p.requires_grad),
            "training_seconds": None if options.resume_from else round(seconds, 1),
        }
        return test(options, trainer, module, data, checkpoint, folder, training)


def evaluate(options: Options, given: set[str]) -> dict[str, float]:
    """Evaluates `load_path`; the model's options come from the checkpoint, and `given` ones may not contradict it."""
    assert options.load_path is not None
    say_device(options)
    checkpoint = read_checkpoint(options.load_path)
    check_agreement(options, checkpoint, given)
    arrow = open_spec(options.task, options.data_root, options.splits)
    image_size = checkpoint.spec.architecture.image_size
    check_classes(checkpoint, ArrowDataset(arrow, options.data_root, "test", image_size))  # before anything heavy
    classifier, data = open_evaluation(options, checkpoint, given)
    name = options.test_exp_name or (
        f"{options.exp_name}_test_{options.missing_type['test']}_{options.missing_ratio['test']:g}"
    )
    custom = data.spec.custom
    folder = start_folder(with_model_of(checkpoint, options, given), name, custom)
    trainer = make_trainer(options, folder, steps_per_epoch=1)
    module = FinetuneModule(classifier, replace(checkpoint.spec, custom=custom))
    with data.naming_dead_workers(), ending_together(trainer):
        return test(options, trainer, module, data, checkpoint, folder)


def open_evaluation(
    options: Options, checkpoint: Checkpoint, given: set[str]
) -> tuple[MissingModalityClassifier, MissingModalityData]:
    """The model of `checkpoint`, on the backbone it was trained on, and the test split for it."""
    classifier, tokenizer = open_model(checkpoint, backbone_choice(asdict(options), given), options.vit)
    set_computation(options, classifier)
    data = open_data(options, checkpoint.spec.architecture.image_size, tokenizer)
    return classifier, data


def backbone_choice(options: Mapping[str, Any], given: set[str]) -> BackboneChoice:
    """What the user says of the backbone; its name counts only where it is `given`."""
    vit = options["vit"] if "vit" in given else None
    others = ("vit_activation", "tokenizer", "trust_backbone", "published_seed")
    return BackboneChoice(vit, *(options[name] for name in others))


def test(
    options: Options,
    trainer: pl.Trainer,
    module: FinetuneModule,
    data: MissingModalityData,
    checkpoint: Checkpoint,
    folder: Path | None,
    training: dict[str, Any] | None = None,
) -> dict[str, float]:
    """Runs the test split, prints the result and writes it, with `training`, to `test_results.json`."""
    started = time.monotonic()
    trainer.test(module, datamodule=data, verbose=False)
    dataset = data.datasets["test"]
    pattern = data.patterns["test"]
    result = {
        "task": options.task,
        "split": "test",
        "samples": module.tested_samples,
        "missing": type_counts(dataset.missing_type_of_sample),
        "missing_pattern": pattern.recorded(),
        "metrics": module.test_metrics,
        "checkpoint": str(checkpoint.path),
        "checkpoint_sha256": checkpoint.sha256,
        "precision": options.precision,
        "seconds": round(time.monotonic() - started, 1),
        **(training or {}),
    }
    if trainer.is_global_zero:
        assert folder is not None
        write_json(folder / "test_results.json", result)
        counts = ", ".join(f"{count:,} {name}" for name, count in result["missing"].items())
        print(f"\ntest of {checkpoint.path} (sha256 {checkpoint.sha256[:12]})")
        print(
            f"  {options.task} test, {pattern.ratio:.0%} missing ({pattern.missing_type}), seed {pattern.seed}: "
            f"{module.tested_samples:,} samples: {counts}"
        )
        for metric, value in module.test_metrics.items():
            print(f"  test/{metric:<12} {value:.4f}")
        print(f"  written to {folder / 'test_results.json'}\n")
    return module.test_metrics


def set_computation(options: Options, classifier: MissingModalityClassifier) -> None:
    """Sets how the towers compute, once their weights are there."""
    classifier.compute(COMPUTE_TYPES[options.precision], checkpointing=options.activation_checkpointing)


def measure_target(target: Target, given: set[str]) -> Robustness | None:
    """Encodes what a target lacks and writes its results; they are None on other processes than the first.

    Raises:
        CheckpointError: the checkpoint was replaced since the target was opened.
    """
    options, subject, store = target.options, target.subject, target.store
    needed = ", ".join(TYPE_NAMES[missing_type] for missing_type in target.lacking)
    log.info("%s: needs encodings: %s", subject.checkpoint, needed or "none")
    if target.lacking:
        store.check_writable()
        say_device(options)
        checkpoint = read_checkpoint(subject.checkpoint)
        if checkpoint.sha256 != subject.checkpoint_sha256:
            raise CheckpointError(f"{subject.checkpoint}: was replaced by another checkpoint a moment ago; start again")
        classifier, data = open_evaluation(options, checkpoint, given)
        trainer = make_trainer(options, None, steps_per_epoch=1)
        with data.naming_dead_workers(), ending_together(trainer):
            encode(store, target.lacking, LogitModule(classifier, checkpoint.spec), trainer, data)
    if getattr(rank_zero_only, "rank", 0):
        return None
    found = measure(subject, store.load(), target.patterns, options.bootstrap)
    names = write_results(found, store)
    log.info("written to %s: %s", store.folder, ", ".join(["logits.arrow", *names]))
    return found


def open_data(options: Options, image_size: int, tokenizer: ClipTokenizer) -> MissingModalityData:
    """The splits that this run reads."""
    if options.image_size not in (None, image_size):
        raise ConfigError(
            f"image_size: expected {image_size}, which is what the position embeddings of the backbone are for, "
            f"found {options.image_size}"
        )
    data = MissingModalityData(options.data_settings(), options.splits, image_size, tokenizer, tokenizer.fingerprint)
    log.info("data of %s:\n%s", options.data_root, data.describe())
    return data


def warm_start(
    classifier: MissingModalityClassifier,
    checkpoint: Checkpoint,
    backbone: Backbone,
    published_seed: int,
    *,
    with_head: bool,
) -> None:
    """Starts from the memory of `checkpoint` (and its head), and says what it took.

    Raises:
        CheckpointError: the memory does not fit, or was trained on another backbone.
    """
    if not checkpoint.published:
        check_backbone(checkpoint, backbone)
    start = restore_classifier(checkpoint, None if checkpoint.published else backbone, published_seed)
    heads = tuple(f"{head_name(task)}." for task in (*TASKS, CUSTOM))
    own, theirs = classifier.state_dict(), start.state_dict()
    # What REP as described adds to the released model starts as the identity, and is not in checkpoints without it.
    method = classifier.method
    added = tuple(f"model.{method.attribute}.{beginning}" for beginning in method.identity_at_init)
    absent = {name for name in kept_names(classifier) if name.startswith(added)} - set(kept_names(start))
    of_this_model = [name for name in kept_names(classifier) if name not in absent]
    wanted = [name for name in of_this_model if with_head or not name.startswith(heads)]
    misfits = [name for name in wanted if name not in theirs or own[name].shape != theirs[name].shape]
    if misfits:
        raise CheckpointError(
            f"load_path={checkpoint.path}: {len(misfits)} entries do not fit this model, for example {misfits[0]}: its "
            f"task is {checkpoint.spec.task}, its method {checkpoint.spec.method}, its head {checkpoint.spec.head}"
        )
    with torch.no_grad():
        for name in wanted:
            own[name].copy_(theirs[name])
    log.info(
        "warm start from %s: %d entries of the memory loaded, %s",
        checkpoint.path,
        len([name for name in wanted if not name.startswith(heads)]),
        "the head too" if with_head else "the head starts anew (finetune_first=True takes it too)",
    )


def check_resume(
    checkpoint: Checkpoint, spec: ModelSpec, backbone: Backbone, tokenizer: ClipTokenizer, dataset: ArrowDataset
) -> None:
    """Raises CheckpointError unless training can go on from `checkpoint` with this model on `dataset`."""
    if checkpoint.published:
        raise CheckpointError(f"resume_from={checkpoint.path}: a published checkpoint; use it as load_path")
    if not checkpoint.resumable:
        raise CheckpointError(
            f"resume_from={checkpoint.path}: does not hold where the training stood, as last.ckpt does; "
            f"use it as load_path"
        )
    check_backbone(checkpoint, backbone)
    check_tokenizer(checkpoint, tokenizer)
    check_classes(checkpoint, dataset)
    if checkpoint.spec != spec:
        theirs, ours = (
            asdict(one.method)
            | {"task": one.task, "head": one.head, "architecture": one.architecture}
            | (asdict(one.custom) if one.custom is not None else {})
            for one in (checkpoint.spec, spec)
        )
        both = [key for key in theirs if key in ours]
        differing = [f"{key} (there {theirs[key]}, here {ours[key]})" for key in both if theirs[key] != ours[key]]
        raise CheckpointError(f"resume_from={checkpoint.path}: a run with other options: {', '.join(differing)}")


@rank_zero_only
def start_folder(options: Options, name: str, custom: CustomData | None) -> Path:
    """The run's new folder, with the configuration and the environment in it; None on other processes than the first.

    The configuration also says what the arrow files say of one's own data, for `run.py runs` and `run.py report`.
    Lightning tells the others where it is.
    """
    folder = make_run_folder(options.log_dir, name)
    EX.current_run.info["folder"] = str(folder)  # type: ignore[attr-defined]  # for `command_line`, and Sacred's record
    write_json(folder / "config.json", described(options, custom))
    write_json(folder / "environment.json", {"command": sys.argv, **environment()})
    log.info("run folder: %s", folder)
    return folder


def described(options: Options, custom: CustomData | None) -> dict[str, Any]:
    """What config.json holds: the options, and what the arrow files say of one's own data."""
    return asdict(options) | ({CUSTOM: asdict(custom)} if custom is not None else {})


def say_device(options: Options) -> None:
    """Says what the run computes on."""
    if options.num_gpus:
        log.info("%d × %s, precision %s", options.processes, torch.cuda.get_device_name(), options.precision)
    else:
        log.info(
            "no GPU in use: runs on the CPU (%d threads), precision %s", torch.get_num_threads(), options.precision
        )


def command_line(argv: list[str]) -> int:
    """Runs a command as Sacred reads it; returns the exit status, after a line on standard error if it is not 0."""
    EX.current_run = None  # that of an earlier call in this process
    try:
        argv = with_names_of_here(argv)
        check_command_line(argv)
        with stopping_on_signals():
            if not {"help", "--help", "-h"} & set(argv[1:2]):
                # --debug hands errors on to here instead of printing a traceback
                argv = [*argv, *(["main"] if len(argv) == 1 else []), "--debug"]
            EX.run_commandline(argv)
    except ConfigAddedError as error:
        unknown = sorted(map(str, error.__conflicting_configs__))
        return end_with_user_error(error, None, str(unknown_option(unknown, list(Options.__dataclass_fields__))))
    except (UserError, SacredError) as error:
        return end_with_user_error(error, run_folder())
    except OtherProcessError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.status
    except torch.OutOfMemoryError as error:
        return end_with_user_error(error, run_folder(), f"{first_line(error)} A smaller per_gpu_batchsize needs less.")
    except Stopped as stop:
        end_loaders()
        # Of the other processes Lightning takes any status but 0 for a fault, and kills the first.
        return DONE if getattr(rank_zero_only, "rank", 0) else end_with_signal(int(str(stop.code)), run_folder())
    except SystemExit as stop:
        if isinstance(stop.code, str):  # Sacred's own: usage, or an unknown command
            print(stop.code, file=sys.stderr)
        return USER_ERROR if stop.code else DONE
    except KeyboardInterrupt:
        return end_with_signal(INTERRUPTED, run_folder())
    except Exception as error:
        if EX.current_run is None:  # Sacred did not get beyond reading the command line
            return end_with_user_error(error, None, f"command line: {first_line(error)}")
        if isinstance(error, OSError) and (refusal := machine_error(error, run_folder())) is not None:
            return end_with_user_error(error, run_folder(), str(refusal))
        return end_with_our_fault(error, run_folder())
    return DONE


def run_folder() -> Path | None:
    """The folder that this call's run has made, if it has."""
    folder = EX.current_run.info.get("folder") if EX.current_run is not None else None
    return Path(folder) if folder is not None else None


if __name__ == "__main__":
    sys.exit(command_line(sys.argv))
