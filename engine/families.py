"""Families of backbones: how each is built, and where its weights and its tokenizer come from.

A new family is a class and an entry in FAMILIES; a dataset's row names its family.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clip.backbone import HUB_NAMES, FrozenWeights, load_backbone
from clip.modules.interfaces import Backbone
from clip.modules.vision_transformer_memory import ClipArchitecture, ClipBackbone
from clip.tokenizer import FILES, ClipTokenizer, load_tokenizer
from common.errors import BackboneError, ConfigError
from engine.exported import weights_file
from sensors import weights as sensor_weights
from sensors.backbone import build
from sensors.sizes import SensorSizes, shapes_of, size_of
from sensors.weights import RANDOM, published_weights, silences, sizes_for
from vilt.datasets.arrow_dataset import ArrowDataset
from vilt.datasets.kinds import InputFormat, root_mean_squares
from vilt.datasets.open_spec import open_spec
from vilt.datasets.specs import CLIP, EVERY_DATASET, VLA
from vla import weights as vla_weights
from vla.backbone import VlaArchitecture, VlaBackbone


class BackboneChoice(NamedTuple):
    """The user's choice of frozen weights and what goes with them; None: as the checkpoint says."""

    vit: str | None = None
    activation: str | None = None
    tokenizer: str | None = None
    trust: bool = False
    published_seed: int = 0  # seed of the run that wrote a published checkpoint
    image_size: int | None = None
    task: str | None = None
    data_root: Path | None = None
    network: dict[str, Any] | None = None  # sizes of randomly drawn weights, if not the task's
    seed: int = 0  # seed of randomly drawn weights


def check_network(choice: BackboneChoice, size: Callable[[str], Any], source: str) -> None:
    """Raises ConfigError if the option `network` asks for another size than the weights of `source` have.

    Args:
        size: gives the size that the weights have, by the name of the entry.
    """
    for entry, asked in (choice.network or {}).items():
        if asked != size(entry):
            raise ConfigError(f"network.{entry}: expected {size(entry)}, as in {source}, found {asked}")


class Family:
    """A kind of backbone: how to build it, load its weights and prepare its inputs."""

    architecture: type[Any]  # dataclass of the sizes, saved in checkpoints

    def build(self, architecture: Any) -> Backbone:
        """A backbone with random weights."""
        raise NotImplementedError

    def load(self, choice: BackboneChoice, trained_on: Any = None) -> FrozenWeights:
        """The frozen weights; `trained_on` is the architecture in a checkpoint. Raises BackboneError."""
        raise NotImplementedError

    def inputs(self, choice: BackboneChoice, architecture: Any) -> InputFormat:
        """The input format, checked against `architecture` unless that is None. Raises BackboneError, ConfigError."""
        return InputFormat()

    def fits(self, architecture: Any, choice: BackboneChoice) -> bool:
        """Whether `architecture` takes data of the shapes that the data of `choice` have."""
        return True

    def start_embeddings(self, weights: FrozenWeights, inputs: InputFormat) -> dict[str, Tensor]:
        """The embeddings that a method's parameters may be initialised from, see `Method.start_from`."""
        return {}


class ClipFamily(Family):
    """CLIP with two transformer towers."""

    architecture = ClipArchitecture

    def build(self, architecture: ClipArchitecture) -> Backbone:
        return ClipBackbone(architecture)

    def load(self, choice: BackboneChoice, trained_on: ClipArchitecture | None = None) -> FrozenWeights:
        assert choice.vit is not None
        activation = choice.activation
        if activation is None and trained_on is not None and Path(choice.vit).is_file():
            activation = trained_on.activation
        return load_backbone(choice.vit, trust=choice.trust, activation=activation)

    def inputs(self, choice: BackboneChoice, architecture: ClipArchitecture | None) -> InputFormat:
        """The input format, with the tokenizer that the user names or the one that comes with the backbone."""
        vit = str(choice.vit)
        folder = Path(vit) if Path(vit).is_dir() else Path(vit).parent
        comes_along = Path(vit).is_dir() or (Path(vit).is_file() and any((folder / name).is_file() for name in FILES))
        source = choice.tokenizer or (str(folder) if comes_along else HUB_NAMES.get(vit, HUB_NAMES["ViT-B/16"]))
        tokenizer = load_tokenizer(source)
        if architecture is None:
            return InputFormat(tokenize=tokenizer, fingerprint=tokenizer.fingerprint)
        if tokenizer.vocab_size > (most := architecture.vocab_size):
            raise BackboneError(
                f"tokenizer={source}: has {tokenizer.vocab_size} ids, but the backbone embeds only {most}"
            )
        if choice.image_size not in (None, expected := architecture.image_size):
            raise ConfigError(
                f"image_size: expected {expected}, the size that the backbone's position embeddings are for, "
                f"found {choice.image_size}"
            )
        return InputFormat(expected, tokenizer, tokenizer.fingerprint)

    def start_embeddings(self, weights: FrozenWeights, inputs: InputFormat) -> dict[str, Tensor]:
        """The class embedding of images, the embedding of `<end>` in texts, and the ids of the start and end marks."""
        tokenizer = inputs.tokenize
        assert isinstance(tokenizer, ClipTokenizer)
        text = weights.state["text_encoder.token_embedding.weight"][tokenizer.end_id]
        marks = torch.tensor([tokenizer.start_id, tokenizer.end_id])
        return {"image": weights.state["image_encoder.class_embedding"], "text": text, "text_marks": marks}


class SensorFamily(Family):
    """SW-Transformer and DeepSense, with random weights, weights pretrained here, or published ones."""

    architecture = SensorSizes

    def build(self, architecture: SensorSizes) -> Backbone:
        return build(architecture)

    def load(self, choice: BackboneChoice, trained_on: SensorSizes | None = None) -> FrozenWeights:
        vit = str(weights_file(Path(str(choice.vit))))
        if trained_on is not None:
            self._check_network(choice, trained_on, "the checkpoint")
        if vit.partition(":")[0] == RANDOM:
            seed = int(number) if (number := vit.partition(":")[2]).isdigit() else choice.seed
            return sensor_weights.random_weights(trained_on or self._sizes(choice, scaled=True), seed)
        if not Path(vit).is_file():
            raise BackboneError(f"vit: expected {RANDOM}, or a file with a pretrained backbone, found {vit!r}")
        from engine.checkpoint import backbone_in  # here, as it imports this module

        if (ours := backbone_in(Path(vit))) is not None:
            if trained_on is None:
                sizes = self._sizes(choice._replace(network=None), scaled=False)
                expected, found = shapes_of(sizes), shapes_of(ours.architecture)
                if found != expected:
                    raise BackboneError(f"vit: expected a backbone of {expected}, found one of {found} in {vit}")
                self._check_network(choice, ours.architecture, vit)
            return ours
        return published_weights(Path(vit), trained_on or self._sizes(choice, scaled=False))

    def fits(self, architecture: SensorSizes, choice: BackboneChoice) -> bool:
        return shapes_of(self._sizes(choice._replace(network=None), scaled=False)) == shapes_of(architecture)

    def _check_network(self, choice: BackboneChoice, trained: SensorSizes, source: str) -> None:
        if choice.network:
            sizes = self._sizes(choice._replace(network={"type": trained.network, **choice.network}), scaled=False)
            asked = {entry: size_of(sizes, entry) for entry in choice.network}
            check_network(choice._replace(network=asked), partial(size_of, trained), source)

    def _sizes(self, choice: BackboneChoice, scaled: bool) -> SensorSizes:
        assert choice.task is not None and choice.data_root is not None
        row = open_spec(choice.task, choice.data_root, ["train"])
        scale = root_mean_squares(ArrowDataset(row, choice.data_root, "train")) if scaled and row.scaled else {}
        return sizes_for(row, choice.network or {}, scale)

    def start_embeddings(self, weights: FrozenWeights, inputs: InputFormat) -> dict[str, Tensor]:
        """The token of a patch of silence, keyed by modality."""
        return silences(weights)


class VlaFamily(Family):
    """MulT, with random weights for stage 1, or weights from a stage-1 checkpoint, ours or a published one."""

    architecture = VlaArchitecture

    def build(self, architecture: VlaArchitecture) -> Backbone:
        return VlaBackbone(architecture)

    def load(self, choice: BackboneChoice, trained_on: VlaArchitecture | None = None) -> FrozenWeights:
        """The frozen weights; from a checkpoint, all but the projections, which belong to its data."""
        vit = str(weights_file(Path(str(choice.vit))))
        if trained_on is None:
            ours = self._architecture(choice)
        else:
            vla_weights.check_sizes(choice.network or {})
            check_network(choice, partial(getattr, trained_on), "the checkpoint")
        if vit.partition(":")[0] == RANDOM:
            seed = int(number) if (number := vit.partition(":")[2]).isdigit() else choice.seed
            return vla_weights.random_weights(trained_on or replace(ours, project_all=False), seed)
        if not Path(vit).is_file():
            raise BackboneError(f"vit: expected {RANDOM}, or a checkpoint of stage 1, found {vit!r}")
        from engine.checkpoint import read_checkpoint, restore_classifier  # here, as it imports this module

        checkpoint = read_checkpoint(Path(vit))
        theirs = checkpoint.spec.architecture
        if not isinstance(theirs, VlaArchitecture):
            raise BackboneError(f"vit: expected a checkpoint of stage 1, found one of {checkpoint.spec.task} in {vit}")
        check_network(choice, partial(getattr, theirs), vit)
        start = None if checkpoint.published else self.load(BackboneChoice(checkpoint.backbone_place), theirs)
        state = restore_classifier(checkpoint, start).state_dict()
        return vla_weights.taken_over(vit, state, theirs, trained_on or ours)

    def fits(self, architecture: VlaArchitecture, choice: BackboneChoice) -> bool:
        return self._architecture(choice).shapes == architecture.shapes

    def _architecture(self, choice: BackboneChoice) -> VlaArchitecture:
        assert choice.task is not None and choice.data_root is not None
        row = open_spec(choice.task, choice.data_root, ["train"])
        shapes = {name: modality.shape for name, modality in row.modalities.items()}
        return vla_weights.architecture_for(shapes, choice.network or {})


FAMILIES: dict[str, Family] = {CLIP: ClipFamily(), "sensors": SensorFamily(), VLA: VlaFamily()}


def family_of(task: str) -> Family:
    """The family of backbones for a task."""
    return FAMILIES[EVERY_DATASET[task].family]
