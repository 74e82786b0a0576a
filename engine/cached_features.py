"""Outputs of the frozen towers for every input, computed once and cached next to the arrow files.

There is one safetensors file for each split, named by a hash of everything its content depends on. For each modality it
holds, in float32, the outputs (n, D) of the last block at the position where features are read, before norm and
projection (`Tower.body`), and as `MODALITY.features` the features (n, E) after the pretrained norm and projection. An
image has one entry per row, a text one of its own; for texts in W windows the shapes are (n, W, D) and (n, W, E).
"""

import hashlib
import logging
import shutil
from collections.abc import Sequence
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from clip.backbone import FrozenWeights
from clip.modules.classifier import MissingModalityClassifier
from clip.modules.interfaces import NO_SLOTS, Tower
from clip.trainable import has_frozen_towers
from common.errors import ConfigError, reason_of
from common.files import atomic_path
from common.hashing import file_sha256
from common.locks import waiting_lock
from engine.families import family_of
from engine.open_model import COMPUTE_TYPES
from engine.training import model_input
from vilt.batches import collate
from vilt.datamodules import MissingModalityData, leave_group
from vilt.datasets.arrow_dataset import ArrowDataset
from vilt.datasets.kinds import Kind, kinds_of
from vilt.utils.ordered_threads import in_order

log = logging.getLogger("rep")

FORMAT = 1
"""Version of the cached files: increase it when the numbers or the layout change."""
ROWS = 64
"""Inputs of one forward pass, whatever the training's batch size, so that a resumed run gets the same bits."""
PART = 16 * ROWS
"""Inputs per part; each part is saved as soon as it is computed, so that an interrupted run can continue."""
FEATURES = ".features"
"""Suffix of the entries with features."""


def has_constant_features(classifier: MissingModalityClassifier) -> bool:
    """Whether the last blocks' outputs are constant: nothing up to them is trained, and no tower reads another."""
    return has_frozen_towers(classifier, but_for=classifier.model.ends) and not classifier.model.mixes


def cache_features(
    data: MissingModalityData,
    backbone: FrozenWeights,
    tokenizer: str,
    precision: str,
    device: torch.device,
    *,
    must_keep: bool = False,
) -> None:
    """Replaces the inputs of the datasets by the outputs of the frozen towers, computed or read from the cache.

    Args:
        tokenizer: fingerprint of the tokenizer.
        must_keep: raise OSError if the files cannot be written; otherwise the outputs are computed for this run only.

    Raises:
        ConfigError: the backbone's towers read each other.
        DataError: an input cannot be read.
    """
    model_key = [FORMAT, backbone.sha256, backbone.architecture, tokenizer, precision, PIL.__version__]
    first = next(iter(data.datasets.values()))
    windows = max(kind.max_windows for kind in first.kinds.values())
    model_key += [windows, first.group_texts] if windows > 1 else []
    digest = hashlib.sha256(repr(model_key).encode()).hexdigest()

    @cache
    def towers() -> dict[str, Tower]:
        model = family_of(data.settings.dataset).build(backbone.architecture)
        if model.mixes:
            expected = "expected a backbone that encodes each modality by itself"
            raise ConfigError(f"features: {expected}, found one whose modalities read each other")
        backbone.load_into(model)
        model.compute(COMPUTE_TYPES[precision])
        return model.to(device).eval().towers

    for split, dataset in data.datasets.items():
        arrow = file_sha256(dataset.path)
        path = dataset.path.with_name(f"{dataset.path.stem}_features_{digest[:16]}_{arrow[:16]}.safetensors")
        cached = _read(path)
        if cached is None:
            maker = _Maker(dataset, towers(), data.settings.num_workers, device, must_keep)
            try:
                cached = _made_once(path, maker)
            except OSError as error:  # a read-only folder
                maker.refused(path, error)
                cached = maker.make(None)
        dataset.cached = {name: x for name, x in cached.items() if not name.endswith(FEATURES)}
        counts = ", ".join(
            f"{' × '.join(f'{size:,}' for size in x.shape)} {name}" for name, x in dataset.cached.items()
        )
        log.info("%s: frozen towers run once, for all epochs: %s (%s)", split, counts, path.name)


def training_batches(data: MissingModalityData, *, cached: bool) -> DataLoader[Any]:
    """Loads the samples that training uses in order, with the modalities of their missing table left out.

    Args:
        cached: whether to load the cached outputs of the frozen towers instead of the inputs.
    """
    dataset = data.datasets["train"].without_draws()
    dataset.cached = dataset.cached if cached else None
    return DataLoader(
        dataset,
        batch_size=data.settings.per_gpu_batchsize,
        sampler=[(0, index) for index in dataset.chosen],  # epoch and index
        collate_fn=partial(collate, kinds_of(data.spec), once=True, cached=cached),
        num_workers=0 if cached else data.settings.num_workers,
        worker_init_fn=leave_group,
    )


def at_their_index(dataset: ArrowDataset, x_n: Tensor) -> Tensor:
    """Values (N, …) for all samples from those of the chosen ones; 0 for samples that training leaves out."""
    x_N = x_n.new_zeros(len(dataset), *x_n.shape[1:])
    x_N[torch.from_numpy(dataset.chosen)] = x_n
    return x_N


@torch.no_grad()
def remember_training_split(classifier: MissingModalityClassifier, data: MissingModalityData) -> None:
    """Stores the features and labels of the training split in the classifier's `Neighbours`, if it has them."""
    if classifier.neighbours is None:
        return
    features, present, labels = [], [], []
    for batch in training_batches(data, cached=True):
        inputs = model_input(batch)
        by_modality, _ = classifier.features(inputs)
        features.append(torch.cat([by_modality[name] for name in classifier.neighbours.widths], dim=1))
        present.append(inputs.joined().present_BM)
        labels.append(batch.label)
    dataset = data.datasets["train"]
    features_NF, present_NM, labels_N = (at_their_index(dataset, torch.cat(x)) for x in (features, present, labels))
    classifier.neighbours.store(features_NF, present_NM, labels_N, torch.from_numpy(dataset.row_of_sample))


def _made_once(path: Path, maker: "_Maker") -> dict[str, Tensor]:
    """Computes the file, or reads it. If several processes ask at once, one computes and the others wait."""
    parts = path.with_name(f".{path.name}.parts")
    with waiting_lock(path.with_name(f".{path.name}.lock"), f"{path}: waiting for another process to compute it"):
        if (cached := _read(path)) is not None:
            return cached
        parts.mkdir(exist_ok=True)
        cached = maker.make(parts)
        maker.write(path, cached)
        shutil.rmtree(parts)
        for other in path.parent.glob(f"{path.stem.rpartition('_')[0]}_{'[0-9a-f]' * 16}{path.suffix}"):
            if other != path:
                other.unlink()
                log.info("%s: removed, as it was made from another version of the arrow file", other)
    return cached


class _Maker:
    """Runs the towers on all inputs of a split, including those that the missing table leaves out."""

    def __init__(
        self, dataset: ArrowDataset, towers: dict[str, Tower], workers: int, device: torch.device, must_keep: bool
    ) -> None:
        self.dataset, self.towers, self.workers, self.device = dataset, towers, workers, device
        self.must_keep, self.writes = must_keep, True

    def make(self, parts: Path | None) -> dict[str, Tensor]:
        """The outputs for the whole split; parts already in the folder `parts` are read, new ones are saved there."""
        made = {}
        for name, kind in self.dataset.kinds.items():
            places_n, samples_n = np.unique(kind.position_of_sample, return_index=True)
            samples_n, places_n = samples_n[places_n >= 0], places_n[places_n >= 0]
            computed: list[dict[str, Tensor]] = []
            title = f"{self.dataset.path.name}, {name}"
            with tqdm(total=len(samples_n), desc=title, unit=" inputs", dynamic_ncols=True, disable=None) as bar:
                for start in range(0, len(samples_n), PART):
                    path, samples_p = (parts or Path()) / f"{name}_{start}", samples_n[start : start + PART].tolist()
                    part = _read(path) if parts is not None else None
                    if part is None:
                        part = self._run(name, kind, samples_p)
                        if parts is not None:
                            self.write(path, part)
                    computed.append(part)
                    bar.update(len(samples_p))
            for entry in computed[0] if computed else ():
                x_nD = torch.cat([part[entry] for part in computed])
                made[entry] = x_nD.new_zeros(int(places_n.max()) + 1, *x_nD.shape[1:])
                made[entry][torch.from_numpy(places_n)] = x_nD
        return made

    @torch.no_grad()
    def _run(self, name: str, kind: Kind, samples: Sequence[int]) -> dict[str, Tensor]:
        def read(sample: int) -> Tensor:
            found = kind.read(int(self.dataset.row_of_sample[sample]), sample)
            assert found is not None, "texts are tokenised first"
            return found

        tower, inputs = self.towers[name], in_order(read, samples, self.workers)
        x_nD, features_nE = [], []
        while batch := list(islice(inputs, ROWS)):
            windows = batch if kind.max_windows == 1 else [window for text in batch for window in text]
            collated = kind.collate(windows)
            input_b = collated.input_b.to(self.device)
            x_bD = tower.body(tower.embed(input_b)[:, : collated.length], input_b, NO_SLOTS)
            x_nD.append(_per_input(x_bD, kind, batch))
            features_nE.append(_per_input(tower.end(x_bD), kind, batch))
        return {name: torch.cat(x_nD), name + FEATURES: torch.cat(features_nE)}

    def write(self, path: Path, tensors: dict[str, Tensor]) -> None:
        """Writes tensors to a file, completely or not at all."""
        if self.writes:
            try:
                with atomic_path(path) as part:
                    part.write_bytes(save(tensors))
            except OSError as error:
                self.refused(path, error)

    def refused(self, path: Path, error: OSError) -> None:
        """Handles a failed write: raises the error if files must be written, else writes no more."""
        if self.must_keep:
            raise error
        self.writes = False
        log.info("%s: cannot be saved (%s); this run computes it for itself", path, reason_of(error))


def _per_input(x_bD: Tensor, kind: Kind, inputs: Sequence[Tensor]) -> Tensor:
    """Outputs of each input, float32 (n, D), or (n, W, D) for texts in windows, with 0 for windows a text lacks."""
    x_bD = x_bD.float().cpu()
    if kind.max_windows == 1:
        return x_bD
    x_nWD = x_bD.new_zeros(len(inputs), kind.max_windows, x_bD.shape[1])
    for x_WD, own in zip(x_nWD, x_bD.split([len(windows) for windows in inputs]), strict=True):
        x_WD[: len(own)] = own
    return x_nWD


def _read(path: Path) -> dict[str, Tensor] | None:
    """The tensors in a file; None if it is missing or damaged."""
    try:
        return load_file(path) if path.is_file() else None
    except (SafetensorError, OSError) as error:
        log.warning("%s: not readable (%s); computing it again", path, error)
        return None
