"""The content of checkpoints, and reading them.

Ours hold everything but the frozen backbone, of which they keep the name and hash. Published ones hold the whole model
except the dynamic queries, which are drawn from the seed of their run (docs/method.md section 6).
"""

import logging
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from clip.backbone import HUB_NAMES, FrozenWeights
from clip.modules.classifier import MissingModalityClassifier
from clip.modules.heads import LinearHead
from clip.modules.method import UNUSED, MethodOptions
from clip.modules.neighbours import Neighbours
from clip.modules.registry import HEADS, head_class, method_class, methods_of
from clip.published_queries import published_queries
from clip.trainable import freeze, has_frozen_towers, parts_of
from common.errors import CheckpointError
from common.hashing import file_sha256
from common.messages import first_line, quoted
from common.records import record_of
from common.torch_file import check_state, first_of, state_dict_of, unwrapped_names
from engine.exported import DESCRIPTION, WEIGHTS, read_exported, resolve_path, weights_file
from engine.families import BackboneChoice, family_of
from engine.published_checkpoint import load_checkpoint_file, model_names, published_model, published_vla
from engine.tasks import task_of
from vilt.datasets.arrow_dataset import ArrowDataset
from vilt.datasets.custom import CUSTOM_TASKS, CustomData
from vilt.datasets.specs import CLIP, EVERY_DATASET, VLA, DatasetSpec, spec_of, with_shapes
from vilt.missing_tables import NESTED
from vilt.utils.names import normal
from vla.weights import Module

log = logging.getLogger(__name__)

FORMAT = 1
OFFSET = "offset"
"""Key of the offset in a checkpoint's description."""
RESUMED = "epoch", "global_step", "loops", "callbacks", "optimizer_states", "lr_schedulers", "MissingModalityData"
"""Entries that resuming needs, none of them empty."""


@dataclass(frozen=True)
class ModelSpec:
    """The settings that a classifier is built from."""

    task: str
    method: MethodOptions
    architecture: Any  # sizes of the backbone, as its family describes them
    head: str = "linear"
    custom: CustomData | None = None  # classes and metric of a custom dataset (task `custom`)

    @property
    def dataset(self) -> DatasetSpec:
        """The dataset's row, with the array shapes that the model takes."""
        row = spec_of(self.task, self.custom)
        return with_shapes(row, getattr(self.architecture, "shapes", {})) if row.family == VLA else row


@dataclass(frozen=True)
class TokenizerUsed:
    """The tokenizer that a model was trained with."""

    option: str | None  # the run's option `tokenizer`; None for the one that comes with the backbone
    fingerprint: str


@dataclass(frozen=True)
class TrainingRecord:
    """Missing pattern, seed, code version and precision of a training run."""

    missing_type: str
    ratio: float | int
    both_ratio: float | int
    seed: int
    drawing: str = NESTED
    commit: str | None = None  # git commit of the code, with `-dirty` if files were changed; None outside a checkout
    precision: str | None = None  # as Lightning spells it; None if the checkpoint is older than this entry


@dataclass(frozen=True)
class Checkpoint:
    """A parsed checkpoint file."""

    path: Path
    sha256: str
    spec: ModelSpec
    state: dict[str, Tensor]
    backbone_name: str | None = None
    backbone_sha256: str | None = None
    """None, like the name, for a published checkpoint, which holds the backbone itself."""
    class_names: tuple[str, ...] = ()  # in label order; empty if not recorded
    resumable: bool = False  # whether it also holds the training state, as `last.ckpt` does
    tokenizer: TokenizerUsed | None = None  # None if not recorded
    contents: dict[str, str] = field(default_factory=dict)
    """SHA-256 of the files it was trained on (see `engine/contents.py`); empty if not recorded."""
    offset: float | None = None
    """Added to the logits before deciding, chosen on validation (see `engine/decision.py`); None if it has none."""
    training: TrainingRecord | None = None  # None if not recorded

    @property
    def published(self) -> bool:
        """Whether the published code wrote it."""
        return self.backbone_sha256 is None

    @property
    def backbone_place(self) -> str:
        """The backbone as its run named it; a path that was relative to a folder above the checkpoint is resolved."""
        name = str(self.backbone_name)
        return name if name in HUB_NAMES else resolve_path(name, self.path)


def describe(
    spec: ModelSpec,
    backbone_name: str,
    backbone_sha256: str,
    class_names: Sequence[str] = (),
    tokenizer: TokenizerUsed | None = None,
    contents: Mapping[str, str] | None = None,
    offset: float | None = None,
    training: TrainingRecord | None = None,
) -> dict[str, Any]:
    """The description that a checkpoint holds under DESCRIPTION, as plain values."""
    return {
        "format": FORMAT,
        "task": spec.task,
        **asdict(spec.method),
        "head": spec.head,
        "architecture": asdict(spec.architecture),
        "backbone": {"name": backbone_name, "sha256": backbone_sha256},
        "class_names": list(class_names),
        "contents": dict(contents or {}),
        **({"tokenizer": asdict(tokenizer)} if tokenizer is not None else {}),
        **({"custom": asdict(spec.custom)} if spec.custom is not None else {}),
        **({OFFSET: offset} if offset is not None else {}),
        **({"training": asdict(training)} if training is not None else {}),
    }


def build_classifier(spec: ModelSpec) -> MissingModalityClassifier:
    """A classifier with random weights, with the parameters that the task does not train frozen.

    Raises:
        ValueError: the method's sizes do not fit together, or do not fit the backbone.
    """
    task, options = task_of(spec.task, spec.custom), spec.method
    backbone = family_of(spec.task).build(spec.architecture)
    method = method_class(options.prompt_type, spec.dataset.family)(backbone.places, backbone.embed_dim, options)
    windows, parts = options.text_windows, backbone.fused_parts
    if windows > 1 and (spec.dataset.family != CLIP or method.per_sample):
        why = "slots follow from the whole sample" if spec.dataset.family == CLIP else "data have no texts to read"
        whose = f"prompt_type={options.prompt_type} and task={spec.task}, whose {why}"
        raise ValueError(f"text_windows: expected 1 with {whose}; found {windows}")
    parts += windows > 1  # text windows are pooled by mean and maximum
    if spec.head != "linear" and parts != len(backbone.places):
        why = f"with text_windows={windows}" if windows > 1 else "as features are not concatenated"
        raise ValueError(f"head: expected linear {why}, found {spec.head}")
    head = head_class(spec.head)(parts, backbone.embed_dim, task.n_classes, options)
    if backbone.plain_head and isinstance(head, LinearHead):
        head.reset_parameters()
    neighbours, k = None, options.neighbours
    if k:
        widths = {name: backbone.embed_dim * (1 + (windows > 1 and name == "text")) for name in backbone.places}
        neighbours = Neighbours(widths, task.n_classes, k)
    classifier = MissingModalityClassifier(backbone, method, task.head_name, head, neighbours)
    freeze(classifier, spec.task)
    if k and (backbone.mixes or backbone.fused_parts != len(backbone.places) or not has_frozen_towers(classifier)):
        raise ValueError(
            "neighbours: expected frozen towers whose features are concatenated, as with prompt_type=none and "
            f"train_ends=False; found prompt_type={options.prompt_type}, train_ends={options.train_ends} and "
            f"head={spec.head}"
        )
    return classifier


def saved_names(classifier: MissingModalityClassifier) -> list[str]:
    """Names of the entries saved in a checkpoint: all but the frozen backbone and what the method does not use."""
    parts, backbone = parts_of(classifier), classifier.model.parts()
    frozen_parameters = [parameter for part in backbone.values() for parameter in part if not parameter.requires_grad]
    frozen = set(map(id, frozen_parameters))
    statistics = [
        buffer
        for module in classifier.model.modules()
        if any(id(parameter) in frozen for parameter in module.parameters(recurse=False))
        for buffer in module.buffers(recurse=False)
    ]
    left_out = set(map(id, [*frozen_parameters, *statistics, *parts.get(UNUSED, [])]))
    return [name for name, value in classifier.state_dict(keep_vars=True).items() if id(value) not in left_out]


def saved_state(classifier: MissingModalityClassifier) -> dict[str, Tensor]:
    """The entries saved in a checkpoint."""
    state = classifier.state_dict()
    return {name: state[name] for name in saved_names(classifier)}


def load_saved_state(classifier: MissingModalityClassifier, state: dict[str, Tensor], source: str) -> None:
    """Copies a checkpoint's entries into `classifier`; the names must match exactly.

    Raises:
        CheckpointError: names are missing or unexpected, a shape differs, or a value is not finite.
    """
    _load(classifier, model_names(unwrapped_names(state)), saved_names(classifier), source)


def _load(
    classifier: MissingModalityClassifier, state: dict[str, Tensor], expected: Collection[str], source: object
) -> None:
    if classifier.neighbours is not None:
        classifier.neighbours.allocate(len(state.get("neighbours.row_N", ())))
    own = classifier.state_dict()
    try:
        check_state(state, {name: own[name] for name in expected})
    except ValueError as error:
        raise CheckpointError(f"{source}: {error}") from error
    classifier.load_state_dict(state, strict=False)


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads a checkpoint of ours, exported or not, or of the published code, without running any code in it.

    Raises:
        CheckpointError: it is missing, damaged, or not a checkpoint of this model.
    """
    path = weights_file(path)
    if not path.is_file():
        found = "found a folder; name the best.ckpt in it" if path.is_dir() else "found no such file"
        raise CheckpointError(f"load_path={path}: expected a checkpoint, {found}")
    raw = read_exported(path) if path.name == WEIGHTS else load_checkpoint_file(path)
    try:
        if isinstance(raw, Module):
            task, method, architecture, state = published_vla(raw)
            return Checkpoint(path, file_sha256(path), ModelSpec(task, method, architecture), state)
        if not isinstance(raw, dict) or "state_dict" not in raw:
            found = first_of([str(name) for name in raw]) if isinstance(raw, dict) else ""
            raise ValueError(
                f"expected a Lightning checkpoint with a state_dict, found a {type(raw).__name__} {found}".rstrip()
            )
        state = model_names(unwrapped_names(state_dict_of(raw["state_dict"])))
        described = raw.get(DESCRIPTION)
        model = {"spec": ModelSpec(*published_model(state))} if described is None else _described_model(described)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {first_line(error)}") from error
    resumable = all(raw.get(name) not in (None, [], {}) for name in RESUMED)
    return Checkpoint(path, file_sha256(path), state=state, resumable=resumable, **model)


def _described_model(described: Any) -> dict[str, Any]:
    """Reads what `describe` wrote. An option that is missing is newer than the checkpoint, and has its default.

    Raises:
        KeyError, TypeError, ValueError: an entry is missing or invalid.
    """
    found = described.get("format") if isinstance(described, dict) else described
    if found != FORMAT:
        raise ValueError(f"expected checkpoint format {FORMAT}, found {quoted(found)}")
    task, head = described["task"], described.get("head", "linear")
    options = {field.name for field in fields(MethodOptions)} & described.keys()
    method = record_of(MethodOptions, {name: described[name] for name in options})
    if task not in list(EVERY_DATASET):
        raise ValueError(f"task {quoted(task)}, expected one of {', '.join(EVERY_DATASET)}")
    known_values = (
        ("prompt_type", method.prompt_type, methods_of(EVERY_DATASET[task].family)),
        ("head", head, HEADS),
    )
    for option, value, known in known_values:
        if value not in list(known):
            raise ValueError(f"{option} {quoted(value)}, expected one of {', '.join(known)}")
    custom = CustomData.from_dict(described["custom"]) if task in CUSTOM_TASKS else None
    architecture = record_of(family_of(task).architecture, described["architecture"])
    class_names = tuple(map(str, described.get("class_names", ())))
    if class_names and len(class_names) != (expected := task_of(task, custom).n_classes):
        raise ValueError(f"class_names: expected {expected}, found {len(class_names)}")
    offset = described.get(OFFSET)
    if offset is not None and not (type(offset) is float and math.isfinite(offset)):
        raise ValueError(f"{OFFSET}: expected a number, found {quoted(offset)}")
    return {
        "spec": ModelSpec(task, method, architecture, head, custom),
        "backbone_name": str(described["backbone"]["name"]),
        "backbone_sha256": str(described["backbone"]["sha256"]),
        "class_names": class_names,
        "tokenizer": record_of(TokenizerUsed, described["tokenizer"]) if "tokenizer" in described else None,
        "contents": {str(name): str(sha256) for name, sha256 in dict(described.get("contents", {})).items()},
        "offset": offset,
        "training": record_of(TrainingRecord, described["training"]) if "training" in described else None,
    }


def restore_classifier(
    checkpoint: Checkpoint, backbone: FrozenWeights | None, published_seed: int = 0
) -> MissingModalityClassifier:
    """The classifier saved in `checkpoint`.

    Args:
        backbone: the frozen weights; None for a published checkpoint, which has them.
        published_seed: seed of the run that wrote a published checkpoint; its dynamic queries are drawn from it.

    Raises:
        CheckpointError: the backbone is not the one trained on, or the state does not fit.
    """
    path, spec, state = checkpoint.path, checkpoint.spec, checkpoint.state
    try:
        classifier = build_classifier(spec)
    except (ValueError, TypeError, RuntimeError, ArithmeticError) as error:
        raise CheckpointError(f"{path}: no model can have its sizes: {first_line(error)}") from error
    if not checkpoint.published:
        assert backbone is not None, "a checkpoint without frozen weights needs its backbone"
        check_backbone(checkpoint, backbone)
        backbone.load_into(classifier.model)
        _load(classifier, state, saved_names(classifier), path)
        return classifier
    expected = classifier.state_dict().keys()
    if any(".queries_" in name for name in expected - state.keys()):
        drawn = published_queries(spec.architecture, spec.method.slots, published_seed)
        state = {**{f"model.{classifier.method.attribute}.dynamic.{name}": drawn[name] for name in drawn}, **state}
        log.info("%s: dynamic queries drawn as in its run, with seed %d", path, published_seed)
    _load(classifier, state, expected, path)
    return classifier


def backbone_in(path: Path) -> FrozenWeights | None:
    """The backbone in a checkpoint of ours that trained it; None if the file is not a checkpoint of ours.

    Raises:
        CheckpointError, BackboneError: it is damaged, or the backbone it started from is missing.
    """
    if not is_own_checkpoint(path):
        return None
    checkpoint = read_checkpoint(path)
    start = family_of(checkpoint.spec.task).load(
        BackboneChoice(checkpoint.backbone_place), trained_on=checkpoint.spec.architecture
    )
    model = restore_classifier(checkpoint, start).model
    state = {name: tensor for name, tensor in model.state_dict().items() if name in start.state}
    return FrozenWeights(str(path), checkpoint.spec.architecture, state)


def is_own_checkpoint(path: Path) -> bool:
    """Whether a file is a checkpoint of ours. Raises CheckpointError if it cannot be read."""
    raw = read_exported(path) if path.name == WEIGHTS else load_checkpoint_file(path)
    return isinstance(raw, dict) and DESCRIPTION in raw


def check_backbone(checkpoint: Checkpoint, backbone: FrozenWeights) -> None:
    """Raises CheckpointError unless `checkpoint` was trained on `backbone`."""
    theirs = {"sha256": checkpoint.backbone_sha256, **asdict(checkpoint.spec.architecture)}
    ours = {"sha256": backbone.sha256, **asdict(backbone.architecture)}
    differing = [f"{key} (there {theirs[key]}, here {ours[key]})" for key in theirs if theirs[key] != ours[key]]
    if differing:
        raise CheckpointError(
            f"{checkpoint.path}: trained on the backbone {checkpoint.backbone_name}, but vit={backbone.name} has other "
            f"weights or sizes: {', '.join(differing)}"
        )


def check_tokenizer(checkpoint: Checkpoint, fingerprint: str) -> None:
    """Raises CheckpointError if `checkpoint` records another tokenizer."""
    used = checkpoint.tokenizer
    if used is not None and used.fingerprint != fingerprint:
        had = f"tokenizer={used.option}" if used.option is not None else "the tokenizer that comes with its backbone"
        raise CheckpointError(
            f"{checkpoint.path}: trained with {had} (fingerprint {used.fingerprint[:16]}…), "
            f"but this tokenizer differs (fingerprint {fingerprint[:16]}…)"
        )


def check_classes(checkpoint: Checkpoint, dataset: ArrowDataset) -> None:
    """Compares the classes of `checkpoint` with those of `dataset`, if both belong to one task.

    A class named by its number has no known name: the arrow file did not give one.

    Raises:
        CheckpointError: they differ; names the first class that does.
        DataError: the class names in the arrow file are damaged.
    """
    spec = checkpoint.spec
    if spec.task != dataset.spec.name:
        return
    for name, modality in spec.dataset.modalities.items() if spec.dataset.family == VLA else ():
        if (found := dataset.spec.modalities[name].shape) != modality.shape:
            raise CheckpointError(f"{checkpoint.path}: trained on {name} {modality.shape}, {dataset.path} has {found}")
    if spec.custom is not None and dataset.spec.custom is not None:
        difference = spec.custom.difference(dataset.spec.custom)
        if difference is not None:
            raise CheckpointError(
                f"{checkpoint.path}: trained on the classes of {spec.custom.name}, the data's differ: {difference}"
            )
    elif checkpoint.class_names:
        for number, (theirs, ours) in enumerate(zip(checkpoint.class_names, dataset.class_names(), strict=True)):
            if normal(theirs) != normal(ours) and str(number) not in (theirs, ours):
                raise CheckpointError(
                    f"{checkpoint.path}: trained on other classes than those of {dataset.path}: expected "
                    f"{quoted(theirs)} as class {number}, found {quoted(ours)}"
                )
