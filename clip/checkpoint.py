"""Checkpoints: what they hold, reading them, and reading those of the published code.

Ours hold everything but the frozen backbone, and the backbone's name and hash. Published ones hold the whole model
except the dynamic queries, which follow from the seed of their run (docs/method.md section 6). Neither can run code:
`torch.load` runs with `weights_only=True`, and the classes that published files mention become inert stand-ins.
"""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import torch
from torch import Tensor

from clip.backbone import Backbone, architecture_of
from clip.checkpoint_file import check_intact
from clip.modules.classifier import MissingModalityClassifier
from clip.modules.method import UNUSED, MethodOptions
from clip.modules.registry import HEADS, METHODS, head_class, method_class
from clip.modules.vision_transformer_memory import ClipArchitecture, ClipBackbone
from clip.published_queries import published_queries
from clip.tasks import TASK_NAMES, TASKS, task_of
from clip.tokenizer import ClipTokenizer
from clip.trainable import freeze, parts_of
from common.errors import CheckpointError
from common.hashing import file_sha256
from common.messages import first_line, quoted
from common.torch_file import check_archive, fault_of_weights, load_inert
from vilt.datasets.arrow_dataset import ArrowDataset, first_repeated
from vilt.datasets.custom import CUSTOM, CustomData

log = logging.getLogger(__name__)

FORMAT = 1
DESCRIPTION = "rep"
"""Key of a checkpoint under which it says what it is."""
OF_TRAINING = {
    "epoch": int,
    "global_step": int,
    "loops": dict,
    "callbacks": dict,
    "optimizer_states": list,
    "lr_schedulers": list,
    "MissingModalityData": dict,
}
"""Entries that going on with a training takes, with their types; those that are not numbers are not empty."""
STAND_IN_MODULES = ("pytorch_lightning.", "lightning.", "lightning_fabric.", "pathlib.", "_io.")
"""Published checkpoints mention classes of these (callbacks, hyper-parameters, paths). Others are refused."""
PUBLISHED_NAMES = {
    f"model.{tower}_encoder.transformer.resblocks.0.{published}": f"model.{learner}.dynamic.{tower}.{ours}"
    for learner, slots, attention in (
        ("memory_learner", "memories", "attn_memory"),
        ("prompt_learner", "prompts", "attn_prompt"),
    )
    for published, ours in ((f"{attention}.", "attention."), (f"{slots}_dynamic_", "queries_"))
    for tower in ("image", "text")
}
"""Beginnings of names in published checkpoints, and in older ones of ours, that the model has under other names: of
REP's and DCP's dynamic slots, which are in the towers there."""


@dataclass(frozen=True)
class ModelSpec:
    """What a classifier is built from."""

    task: str
    method: MethodOptions
    architecture: ClipArchitecture
    head: str = "linear"
    custom: CustomData | None = None
    """Classes and metric of one's own data (task `custom`)."""


@dataclass(frozen=True)
class TokenizerUsed:
    """The tokenizer of a training."""

    option: str | None
    """What the run had as option `tokenizer`; None for the one that comes with the backbone."""
    fingerprint: str


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint file, read and understood."""

    path: Path
    sha256: str
    spec: ModelSpec
    state: dict[str, Tensor]
    backbone_name: str | None
    backbone_sha256: str | None
    """None, like the name, for a published checkpoint, which holds the backbone itself."""
    class_names: tuple[str, ...] = ()
    """In label order; empty where it does not say them."""
    resumable: bool = False
    """Whether it also holds where the training stood, like `last.ckpt`."""
    tokenizer: TokenizerUsed | None = None
    """None where it does not say it."""

    @property
    def published(self) -> bool:
        """True for a checkpoint of the published code."""
        return self.backbone_sha256 is None


def describe(
    spec: ModelSpec,
    backbone_name: str,
    backbone_sha256: str,
    class_names: Sequence[str] = (),
    tokenizer: TokenizerUsed | None = None,
) -> dict[str, Any]:
    """The plain values that a checkpoint holds under DESCRIPTION."""
    return {
        "format": FORMAT,
        "task": spec.task,
        **asdict(spec.method),
        "head": spec.head,
        "architecture": asdict(spec.architecture),
        "backbone": {"name": backbone_name, "sha256": backbone_sha256},
        "class_names": list(class_names),
        **({"tokenizer": asdict(tokenizer)} if tokenizer is not None else {}),
        **({"custom": asdict(spec.custom)} if spec.custom is not None else {}),
    }


def build_classifier(spec: ModelSpec) -> MissingModalityClassifier:
    """A classifier with random weights, its parameters frozen as the task says.

    Raises:
        ValueError: the method's sizes do not fit each other or the backbone.
    """
    task = task_of(spec.task, spec.custom)
    architecture = spec.architecture
    method = method_class(spec.method.prompt_type)(architecture.places, architecture.embed_dim, spec.method)
    backbone = ClipBackbone(architecture)
    head = head_class(spec.head)(len(backbone.places), backbone.embed_dim, task.n_classes)
    classifier = MissingModalityClassifier(backbone, method, task.head_name, head)
    freeze(classifier, spec.task)
    return classifier


def kept_names(classifier: MissingModalityClassifier) -> list[str]:
    """Names of the entries that a checkpoint keeps: all but the frozen backbone and what the method does not use."""
    parts, backbone = parts_of(classifier), classifier.model.parts()
    of_backbone = [parameter for part in backbone.values() for parameter in part if not parameter.requires_grad]
    left_out = set(map(id, [*of_backbone, *parts.get(UNUSED, [])]))
    return [name for name, value in classifier.state_dict(keep_vars=True).items() if id(value) not in left_out]


def kept_state(classifier: MissingModalityClassifier) -> dict[str, Tensor]:
    """The entries a checkpoint keeps."""
    state = classifier.state_dict()
    return {name: state[name] for name in kept_names(classifier)}


def model_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The entries of a checkpoint under the names that the model has for them (see PUBLISHED_NAMES)."""
    return {model_name(name): tensor for name, tensor in state.items()}


def model_name(name: str) -> str:
    """The name that the model has for an entry of a published checkpoint."""
    for published, ours in PUBLISHED_NAMES.items():
        if name.startswith(published):
            return ours + name.removeprefix(published)
    return name


def load_kept_state(classifier: MissingModalityClassifier, state: dict[str, Tensor], source: str) -> None:
    """Copies a checkpoint's entries into `classifier`; every name is accounted for.

    Raises:
        CheckpointError: names are missing or left over, or a shape differs.
    """
    state = model_names(state)
    _check_fit(classifier, state, set(kept_names(classifier)), source)
    _copy(classifier, state)


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads a checkpoint of ours or of the published code, without running anything in it.

    Its checksums are compared first, which takes half the time of its SHA-256.

    Raises:
        CheckpointError: not there, damaged, or not a checkpoint of this model.
    """
    if not path.is_file():
        raise CheckpointError(f"load_path={path}: no such file")
    raw = _load_inert(path)
    if not isinstance(raw, dict) or not isinstance(raw.get("state_dict"), dict):
        raise CheckpointError(f"{path}: expected a Lightning checkpoint with a state_dict, found {_kind(raw)}")
    state = raw["state_dict"]
    if not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()):
        raise CheckpointError(f"{path}: expected names and tensors in its state_dict")
    for name, value in state.items():
        if (fault := fault_of_weights(value)) is not None:
            raise CheckpointError(f"{path}: {name} {fault}")
    digest = file_sha256(path)
    described = raw.get(DESCRIPTION)
    if described is None:
        return Checkpoint(path, digest, _published_spec(path, state), model_names(state), None, None)
    found = described.get("format") if isinstance(described, dict) else described
    if not isinstance(described, dict) or type(found) is not int or found != FORMAT:
        raise CheckpointError(f"{path}: expected checkpoint format {FORMAT}, found {quoted(found)}")
    try:
        spec = ModelSpec(
            task=_value(described, "task", str),
            method=_described_method(described),
            head=described.get("head", "linear"),
            architecture=_architecture(described["architecture"]),
            custom=CustomData.of(described["custom"]) if described["task"] == CUSTOM else None,
        )
        if spec.task not in TASK_NAMES:
            raise ValueError(f"task {quoted(spec.task)}, expected one of {', '.join(TASK_NAMES)}")
        if spec.method.prompt_type not in METHODS:
            raise ValueError(f"prompt_type {quoted(spec.method.prompt_type)}, expected one of {', '.join(METHODS)}")
        if not isinstance(spec.head, str) or spec.head not in HEADS:
            raise ValueError(f"head {quoted(spec.head)}, expected one of {', '.join(HEADS)}")
        name, backbone_digest = (_value(described["backbone"], key, str) for key in ("name", "sha256"))
        class_names = tuple(map(str, described.get("class_names", ())))
        if class_names and len(class_names) != task_of(spec.task, spec.custom).n_classes:
            raise ValueError(f"{len(class_names)} class names for another number of classes")
        if (twice := first_repeated(class_names)) is not None:
            raise ValueError(f"class_names: expected each name once, found {quoted(twice)} twice")
        tokenizer = _described_tokenizer(described)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: its description is not whole: {first_line(error)}") from error
    return Checkpoint(
        path, digest, spec, model_names(state), name, backbone_digest, class_names, _is_resumable(raw), tokenizer
    )


def _described_method(described: dict[str, Any]) -> MethodOptions:
    """Options that a checkpoint does not name are newer than it, and have their defaults."""
    if not {"memory_length", "memory_depth"} <= described.keys():
        raise ValueError(f"memory_length, memory_depth: expected both, found {quoted(sorted(described))}")
    options = MethodOptions()
    for field in fields(MethodOptions):
        if field.name in described:
            kind = type(field.default)
            options = replace(options, **{field.name: _value(described, field.name, kind)})
    return options


def _described_tokenizer(described: dict[str, Any]) -> TokenizerUsed | None:
    """None where the checkpoint is older than this entry."""
    if "tokenizer" not in described:
        return None
    used = _value(described, "tokenizer", dict)
    option = None if used["option"] is None else _value(used, "option", str)
    return TokenizerUsed(option, _value(used, "fingerprint", str))


def _value(described: dict[str, Any], key: str, kind: type) -> Any:
    """One entry of a description. Raises KeyError, TypeError, ValueError."""
    if type(described[key]) is not kind:
        raise ValueError(f"{key}: expected {kind.__name__}, found {quoted(described[key])}")
    return described[key]


def _architecture(described: object) -> ClipArchitecture:
    kinds = get_type_hints(ClipArchitecture)
    if not isinstance(described, dict):
        raise ValueError(f"architecture: expected sizes by name, found {quoted(described)}")
    if odd := [name for name in {**kinds, **described} if name not in kinds or name not in described]:
        raise ValueError(f"architecture: {quoted(odd[0])} is {'missing' if odd[0] in kinds else 'unexpected'}")
    return ClipArchitecture(**{key: _value(described, key, kind) for key, kind in kinds.items()})


def _is_resumable(raw: dict[str, Any]) -> bool:
    return all(type(raw.get(name)) is kind and (kind is int or raw[name]) for name, kind in OF_TRAINING.items())


def restore_classifier(
    checkpoint: Checkpoint, backbone: Backbone | None, published_seed: int = 0
) -> MissingModalityClassifier:
    """The classifier that `checkpoint` holds.

    Args:
        backbone: the frozen weights; None for a published checkpoint, which has them.
        published_seed: that of the run which wrote a published checkpoint; its dynamic queries follow from it.

    Raises:
        CheckpointError: the backbone is another one, or the state does not fit.
    """
    if not checkpoint.published:
        assert backbone is not None, "a checkpoint without frozen weights needs its backbone"
        check_backbone(checkpoint, backbone)
    try:
        with torch.device("meta"):  # sizes alone, until the file is known to fill them
            planned = build_classifier(checkpoint.spec)
    except (ValueError, TypeError, RuntimeError, ArithmeticError) as error:
        raise CheckpointError(f"{checkpoint.path}: no model has its sizes: {first_line(error)}") from error
    expected = set(planned.state_dict() if checkpoint.published else kept_names(planned))
    queries = {name for name in expected if ".dynamic." in name and ".queries_" in name}
    absent = queries - checkpoint.state.keys()
    unsaved = absent if checkpoint.published else set()
    _check_fit(planned, checkpoint.state, expected - unsaved, str(checkpoint.path))
    classifier = build_classifier(checkpoint.spec)
    if backbone is not None and not checkpoint.published:
        backbone.load_into(classifier.model)
    _copy(classifier, checkpoint.state)
    if unsaved:
        drawn = published_queries(checkpoint.spec.architecture, checkpoint.spec.method.slots, published_seed)
        dynamic = f"model.{planned.method.attribute}.dynamic."
        _copy(classifier, {name: drawn[name.removeprefix(dynamic)] for name in unsaved})
        log.info("%s: dynamic queries as its run with seed %d drew them", checkpoint.path, published_seed)
    return classifier


def check_backbone(checkpoint: Checkpoint, backbone: Backbone) -> None:
    """Raises CheckpointError unless `backbone` is the one that the checkpoint was trained on."""
    if backbone.sha256 != checkpoint.backbone_sha256:
        raise CheckpointError(
            f"{checkpoint.path}: trained on the backbone {checkpoint.backbone_name} "
            f"(sha256 {str(checkpoint.backbone_sha256)[:16]}…), but vit={backbone.name} has other weights "
            f"(sha256 {backbone.sha256[:16]}…)"
        )
    theirs, ours = asdict(checkpoint.spec.architecture), asdict(backbone.architecture)
    differing = [f"{key} (there {theirs[key]}, here {ours[key]})" for key in theirs if theirs[key] != ours[key]]
    if differing:
        raise CheckpointError(
            f"{checkpoint.path}: vit={backbone.name} has the weights it was trained on, but other sizes or another "
            f"activation: {', '.join(differing)}"
        )


def check_tokenizer(checkpoint: Checkpoint, tokenizer: ClipTokenizer) -> None:
    """Raises CheckpointError where `checkpoint` says that it was trained with another tokenizer."""
    used = checkpoint.tokenizer
    if used is not None and used.fingerprint != tokenizer.fingerprint:
        had = f"tokenizer={used.option}" if used.option is not None else "the tokenizer that comes with its backbone"
        raise CheckpointError(
            f"{checkpoint.path}: trained with {had} (fingerprint {used.fingerprint[:16]}…), "
            f"this tokenizer is another one (fingerprint {tokenizer.fingerprint[:16]}…)"
        )


def check_classes(checkpoint: Checkpoint, dataset: ArrowDataset) -> None:
    """Compares the classes that the head of `checkpoint` is for with those of `dataset`, where both are of one task.

    A class whose name is its number has none: the arrow file that it comes from did not say it.

    Raises:
        CheckpointError: they differ; names the first class that does.
        DataError: the class names in the arrow file are damaged.
    """
    spec = checkpoint.spec
    if spec.task != dataset.spec.name:
        return
    if spec.custom is not None and dataset.spec.custom is not None:
        difference = spec.custom.difference(dataset.spec.custom)
        if difference is not None:
            raise CheckpointError(
                f"{checkpoint.path}: trained on the classes of {spec.custom.name}, the data's differ: {difference}"
            )
    elif checkpoint.class_names:
        for number, (theirs, ours) in enumerate(zip(checkpoint.class_names, dataset.class_names(), strict=True)):
            if theirs != ours and str(number) not in (theirs, ours):
                raise CheckpointError(
                    f"{checkpoint.path}: trained on other classes than those of {dataset.path}: expected "
                    f"{quoted(theirs)} as class {number}, found {quoted(ours)}"
                )


def _check_fit(
    classifier: MissingModalityClassifier, state: dict[str, Tensor], expected: set[str], source: str
) -> None:
    missing, unexpected = sorted(expected - state.keys()), sorted(state.keys() - expected)
    if missing or unexpected:
        raise CheckpointError(
            f"{source}: does not fit this model: {len(missing)} names missing {_some(missing)}"
            f", {len(unexpected)} unexpected {_some(unexpected)}"
        )
    own = classifier.state_dict()
    for name in expected:
        if own[name].shape != state[name].shape:
            raise CheckpointError(
                f"{source}: {name} has shape {tuple(state[name].shape)}, expected {tuple(own[name].shape)}"
            )


def _copy(classifier: MissingModalityClassifier, state: dict[str, Tensor]) -> None:
    own = classifier.state_dict()
    with torch.no_grad():
        for name, tensor in state.items():
            own[name].copy_(tensor)


def _some(names: list[str]) -> str:
    return f"({', '.join(names[:6])}{', …' if len(names) > 6 else ''})" if names else ""


def _kind(value: object) -> str:
    if not isinstance(value, dict):
        return type(value).__name__
    return f"a dict of {', '.join(key if isinstance(key, str) else type(key).__name__ for key in list(value)[:5])}"


def _published_spec(path: Path, state: dict[str, Tensor]) -> ModelSpec:
    """Method and sizes from names and shapes; the published files' own description is not needed."""
    dcp = any(name.startswith("model.prompt_learner.") for name in state)
    prompt_type, title = ("dcp", "DCP") if dcp else ("rep", "REP")
    learner = f"model.{method_class(prompt_type).attribute}."
    try:
        slots = len(state[f"{learner}common_{'prompt' if dcp else 'memory'}_complete"])
        architecture = architecture_of(
            {name.removeprefix("model."): value for name, value in state.items()}, "quick_gelu"
        )
    except KeyError as error:
        raise CheckpointError(
            f"{path}: not a whole published {title} checkpoint: {error.args[0]} is not in it; "
            f"found {len(state)} entries {_some(sorted(state))}"
        ) from error
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: not a published {title} checkpoint: {first_line(error)}") from error
    heads = [task for task in TASKS.values() if f"{task.head_name}.weight" in state]
    if len(heads) != 1:
        expected = " or ".join(task.head_name for task in TASKS.values())
        raise CheckpointError(f"{path}: expected one head named {expected}, found {len(heads)}")
    prefix = f"{learner}layernorm_text."
    depth = len({name.removeprefix(prefix).split(".")[0] for name in state if name.startswith(prefix)})
    return ModelSpec(heads[0].name, MethodOptions(prompt_type, 3 * slots, depth), architecture)


class _StandIn:
    """Takes the place of a class that a published checkpoint mentions, and does nothing."""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def _load_inert(path: Path) -> Any:
    try:
        check_archive(path)
        mentioned = torch.serialization.get_unsafe_globals_in_checkpoint(path)  # refuses what is no zip archive
        check_intact(path)
        refused = [name for name in mentioned if not name.startswith(STAND_IN_MODULES)]
        if refused:
            raise CheckpointError(
                f"{path}: mentions {', '.join(refused)}, which a checkpoint has no need of and which might run code; "
                f"not opened"
            )
        # Hyper-parameters come as a subclass of dict; torch's restricted reader fills nothing but plain ones.
        stand_ins: list[Any] = [(dict if name.endswith("AttributeDict") else _StandIn, name) for name in mentioned]
        with torch.serialization.safe_globals(stand_ins):
            return load_inert(path)
    except CheckpointError:
        raise
    except Exception as error:  # torch.load raises many types on damaged files
        raise CheckpointError(f"{path}: not readable as a checkpoint: {first_line(error)}") from error
