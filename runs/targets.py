"""The checkpoints that `run.py robustness` evaluates, with their runs and stored logits."""

import logging
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from typing import Any

from common.errors import ConfigError, DataError
from common.hashing import file_sha256
from common.strict_json import read_json
from common.text import natural_key
from config import Options
from engine.checkpoint import Checkpoint, TrainingRecord, check_classes, read_checkpoint
from engine.exported import WEIGHTS, is_exported
from engine.families import BackboneChoice, family_of
from engine.open_model import precision_of
from engine.robustness import Subject
from engine.stored_logits import LogitStore
from engine.tasks import task_of, with_published_f1
from runs.check_options import check, read_load_paths
from runs.comparable import other_input
from runs.pattern import Pattern
from runs.run_reader import Run, find_runs
from runs.stored_results import cells_by_pattern
from runs.sweep.jobs import search_of
from vilt.datasets.arrow_dataset import ArrowDataset
from vilt.datasets.open_spec import open_spec, rows_of_splits
from vilt.datasets.specs import DatasetSpec
from vilt.missing_tables import NESTED, MissingPattern, after_training

log = logging.getLogger("rep")

TAKEN_FROM_THE_RUN = ("data_root", "missing_table_root", "tokenizer")
"""Options taken from the config.json next to a checkpoint unless given on the command line."""


TestSets = dict[tuple[Path, bool], tuple[ArrowDataset, str]]
"""Opened test sets and the SHA-256 of their arrow files, keyed by arrow file and `group_texts`."""


@dataclass(frozen=True, eq=False)
class Target:
    """One checkpoint to evaluate."""

    options: Options  # options of the evaluation
    subject: Subject
    run: Run | None  # None if there is no record of the training
    store: LogitStore
    encoded: bool  # whether the logits are stored
    patterns: list[list[MissingPattern]]  # for each cell of the matrix, its pattern with every table seed


def open_targets(config: Mapping[str, Any], given: set[str]) -> list[Target]:
    """Opens all checkpoints in `load_path` and checks them before any heavy work starts.

    Args:
        config: the options, not checked yet.
        given: names of the options set on the command line.

    Raises:
        ConfigError, CheckpointError, DataError: an option is invalid, a checkpoint or its stored logits do not fit, or
            the checkpoints (in folders: those of one dataset) do not have the same test set.
    """
    test_sets: TestSets = {}
    places = read_load_paths(config)
    targets = [_open(config, given, path, test_sets) for path in find_checkpoints(places)]
    in_folders = all(place.is_dir() and not is_exported(place) for place in places)
    names = dict.fromkeys(map(dataset_of, targets))
    by_dataset = [[each for each in targets if dataset_of(each) == name] for name in names]
    for group in by_dataset if in_folders else [targets]:
        _check_comparable(group)
    return targets


def dataset_of(target: Target) -> str:
    """Unique key of the target's dataset."""
    custom = target.store.dataset.spec.custom
    return custom.key if custom else target.options.task


def find_checkpoints(places: Sequence[Path]) -> list[Path]:
    """The checkpoints among `places`, and the best.ckpt of each run in and below the folders among them.

    Runs without one are named in a warning. Trials of a search below a folder are left out: the choice among them is
    made in validation, without the test split.

    Raises:
        ConfigError: a place does not exist or contains no checkpoint.
    """
    found: list[Path] = []
    for place in places:
        if is_exported(place) or place.is_file():
            found.append(place / WEIGHTS if place.is_dir() else place)
            continue
        if not place.is_dir():
            raise ConfigError(f"load_path: expected a checkpoint file or a folder of runs, found nothing at {place}")
        runs, damaged = find_runs(place)
        searches = {run.folder: search for run in runs if (search := search_of(run.folder)) and place in search.parents}
        if searches:
            named = ", ".join(str(search) for search in dict.fromkeys(searches.values()))
            log.info("left out, since trials of a search have to be named in load_path: %s", named)
        runs = [run for run in runs if run.folder not in searches]
        trained = [run.folder for run in runs if not (run.is_evaluation or run.pretrains)]
        folders = sorted([*trained, *damaged], key=natural_key)
        below = [path for folder in folders if (path := folder / "best.ckpt").is_file()]
        without = ", ".join(str(folder) for folder in folders if not (folder / "best.ckpt").is_file())
        if not below:
            what = f"runs without one: {without}" if without else "no run"
            raise ConfigError(f"load_path: expected runs with a best.ckpt in {place}, found {what}")
        if without:
            log.warning("left out for lack of a checkpoint: %s", without)
        found += below
    return found


def check_agreement(options: Options, checkpoint: Checkpoint, given: set[str]) -> None:
    """Raises ConfigError if the task or a given option of the model differs from the checkpoint's."""
    spec = checkpoint.spec
    for option, theirs in {"task": spec.task, **asdict(spec.method), "head": spec.head}.items():
        ours = getattr(options, option, theirs)
        if (option in given or option == "task") and theirs != ours:
            raise ConfigError(f"{option}: {ours} contradicts the checkpoint {checkpoint.path}, which has {theirs}")


def as_trained(options: Options, checkpoints: Sequence[Checkpoint], given: Collection[str]) -> Options:
    """The options with the precision that `checkpoints` were trained in, unless a precision is `given`."""
    if "precision" in given:
        return options
    return replace(options, precision=precision_of(checkpoints, options.precision, on_gpu=options.num_gpus > 0))


def with_model_of(checkpoint: Checkpoint, options: Options, given: set[str]) -> Options:
    """The options of an evaluation as recorded: with the method, head and backbone of `checkpoint`."""
    vit = options.vit if "vit" in given or checkpoint.backbone_name is None else checkpoint.backbone_name
    method_options = {name: value for name, value in asdict(checkpoint.spec.method).items() if hasattr(options, name)}
    return replace(options, **method_options, head=checkpoint.spec.head, vit=vit)


def taken_from_run(checkpoint: Path, config: Mapping[str, Any], given: set[str]) -> tuple[Run | None, dict[str, Any]]:
    """The run of a checkpoint, if its config.json is in the same folder, and the options taken from it."""
    source = checkpoint.parent / "config.json"
    run = Run(checkpoint.parent) if source.is_file() and not is_exported(checkpoint.parent) else None
    recorded = {} if run is None else run.config
    taken = {name: recorded[name] for name in TAKEN_FROM_THE_RUN if name in recorded and name not in given}
    if not Path(taken.get("missing_table_root", ".")).is_dir():  # else tables would be written there
        log.warning("%s: missing_table_root: no folder at %s here", source, taken.pop("missing_table_root"))
    return run, taken


def _open(config: Mapping[str, Any], given: set[str], path: Path, test_sets: TestSets) -> Target:
    checkpoint = read_checkpoint(path)
    run, taken = taken_from_run(path, config, given)
    recorded = {} if run is None else run.config
    overrides = {"load_path": str(path), "test_only": True, "test_ratio": 0.0}
    options = check({**config, **taken, **overrides, "task": config["task"] or checkpoint.spec.task})
    if options.fast_dev_run:
        raise ConfigError("fast_dev_run: expected False, since robustness needs the whole test split")
    check_agreement(options, checkpoint, given)
    options = drawn_as_trained(as_trained(options, [checkpoint], given), [checkpoint], given)
    spec = open_spec(options.task, options.data_root, options.splits)
    arrow = options.data_root / spec.file_name("test")
    grouped = checkpoint.spec.method.group_texts
    if (arrow, grouped) not in test_sets:
        opened = ArrowDataset(spec, options.data_root, "test", group_texts=grouped)
        test_sets[arrow, grouped] = opened, file_sha256(arrow)
    dataset, arrow_sha256 = test_sets[arrow, grouped]
    check_classes(checkpoint, dataset)
    if (trained_with := checkpoint.contents.get("data of test", arrow_sha256)) != arrow_sha256:
        there, here = trained_with[:12], arrow_sha256[:12]
        log.warning("%s: %s differs from its run's test set (there sha256 %s…, here %s…)", path, arrow, there, here)
    at = checkpoint.training
    seed, trained = (None, None) if at is None else (at.seed, pattern_of(at))
    if run is not None:
        seed, trained = run.config["seed"], run.pattern
    task = task_of(options.task, spec.custom)
    subject = Subject(
        checkpoint=path,
        checkpoint_sha256=checkpoint.sha256,
        method=str(recorded.get("prompt_type", checkpoint.spec.method.prompt_type)),
        exp_name=str(recorded.get("exp_name", path.stem)),
        train_seed=seed,
        train_pattern=None if trained is None else trained._asdict(),
        precision=options.precision,
        task=with_published_f1(task) if options.published_f1 else task,
        offset=checkpoint.offset,
        other_input=tuple(other_input(asdict(checkpoint.spec.method))),
        table_name=spec.table_name,
        modalities=tuple(spec.modalities),
        class_names=dataset.class_names(),
        missing_table_root=options.missing_table_root,
    )
    published_seed = options.published_seed if checkpoint.published else None
    tokenizer = options.tokenizer
    if checkpoint.published:  # it does not record its tokenizer
        choice = BackboneChoice(options.vit, options.vit_activation, options.tokenizer, options.trust_backbone)
        tokenizer = family_of(options.task).inputs(choice, None).fingerprint
    origin: dict[str, Any] = {"task": options.task, "checkpoint_sha256": checkpoint.sha256}
    origin |= {"arrow_file": arrow.name, "arrow_sha256": arrow_sha256}
    origin |= {"precision": options.precision, "tokenizer": tokenizer, "published_seed": published_seed}
    recorded_options = asdict(with_model_of(checkpoint, options, given))
    store = LogitStore(path.parent / "robustness", origin, dataset, recorded_options)
    encoded = store.exists()
    stored = _stored_cells(store, checkpoint.sha256) if encoded else set()
    return Target(options, subject, run, store, encoded, _patterns(options, spec, stored))


def drawn_as_trained(options: Options, checkpoints: Sequence[Checkpoint], given: Collection[str]) -> Options:
    """The options of an evaluation, with missing tables drawn as in training unless `missing_tables` is chosen.

    Published tables also depend on the training pattern; that of the first checkpoint is used.

    Raises:
        ConfigError: the checkpoints were trained with tables drawn in different ways, and none is chosen.
    """
    trained = [each.training for each in checkpoints if each.training is not None]
    drawings = list(dict.fromkeys(each.drawing for each in trained))
    if "missing_tables" in given or options.missing_tables != NESTED:
        drawings = [options.missing_tables]
    if len(drawings) > 1:
        raise ConfigError(
            f"missing_tables: expected {' or '.join(drawings)} to be chosen, since the checkpoints differ"
        )
    if not trained or drawings == [NESTED]:
        return options
    log.info("missing_tables=%s, drawn after those of training at %s", *drawings, pattern_of(trained[0]))
    return replace(
        options,
        missing_tables=drawings[0],
        missing_type={**options.missing_type, "train": trained[0].missing_type},
        missing_ratio={**options.missing_ratio, "train": float(trained[0].ratio)},
        both_ratio=options.both_ratio if "both_ratio" in given else float(trained[0].both_ratio),
    )


def pattern_of(trained: TrainingRecord) -> Pattern:
    """The missing pattern recorded for a training."""
    return Pattern(trained.missing_type, trained.ratio, trained.both_ratio)


def _stored_cells(store: LogitStore, checkpoint_sha256: str) -> set[Pattern]:
    """The patterns of earlier results from the stored logits; of an unreadable file, which is replaced, none."""
    with suppress(DataError, AttributeError, LookupError, TypeError, ValueError):
        written = read_json(store.folder / "robustness.json")
        if written["checkpoint_sha256"] == checkpoint_sha256:
            return set(cells_by_pattern(store.dataset.spec, written["cells"]))
    return set()


def _patterns(options: Options, spec: DatasetSpec, stored: Collection[Pattern]) -> list[list[MissingPattern]]:
    """The cells of the matrix: those asked for and those `stored`, all with the same table seeds.

    If drawn as published, each is drawn after the training tables, as with `test_only`.
    """
    by_pattern = {Pattern.of(spec, *astuple(cell[0])[:3]): cell for cell in options.robustness_patterns()}
    for pattern in stored:
        cell = [MissingPattern(*pattern, seed, options.missing_tables) for seed in options.robustness_seeds]
        by_pattern.setdefault(pattern, cell)
    cells = [by_pattern[pattern] for pattern in sorted(by_pattern, key=lambda pattern: pattern.place(spec))]
    if options.missing_tables == NESTED:
        return cells
    assert options.data_root is not None
    train, rows = options.data_settings().patterns["train"], rows_of_splits(spec, options.data_root)
    return [[after_training(train, pattern, rows) for pattern in cell] for cell in cells]


def _check_comparable(targets: Sequence[Target]) -> None:
    first = targets[0]
    folders: dict[Path, Target] = {}
    for target in targets:
        path = target.subject.checkpoint
        same_folder = folders.setdefault(target.store.folder.resolve(), target)
        if same_folder is not target:
            raise ConfigError(
                f"load_path: expected one checkpoint per folder, where its results go, found "
                f"{same_folder.subject.checkpoint} and {path}"
            )
        drawings = {each.patterns[0][0].drawing for each in (first, target)}
        if len(drawings) > 1:
            said = f"expected {' or '.join(sorted(drawings))} to be chosen, since the checkpoints differ"
            raise ConfigError(f"missing_tables: {said}: {first.subject.checkpoint} and {path}")
        for name, what in (("task", "dataset"), ("arrow_sha256", "test set")):
            if target.store.origin[name] != first.store.origin[name]:
                raise ConfigError(
                    f"load_path: expected checkpoints with the same {what}, found {first.store.dataset.path} for "
                    f"{first.subject.checkpoint} and {target.store.dataset.path} for {path}"
                )
