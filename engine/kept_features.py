"""What frozen towers make of every input, computed once and kept beside the arrow files.

One safetensors file for each split, named by what its content follows from. By modality it holds, as float32, the
outputs (n, D) of the last block where features are read, which norm and projection follow (`Tower.body`), and as
`MODALITY.features` (n, E) what the pretrained ones make of them; an image once for each row, every text of a row, of
texts in W windows (n, W, D) and (n, W, E).
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
"""Increase it when the numbers or the file's layout change."""
ROWS = 64
"""Of a pass, whatever the batches of the training are, so that a resumed run has the same bits."""
PART = 16 * ROWS
"""Inputs after which what there is so far is kept, to resume from."""
FEATURES = ".features"


def are_constant(classifier: MissingModalityClassifier) -> bool:
    """Whether all that is trained lies above the last blocks of the towers, which read each other in none of them."""
    return has_frozen_towers(classifier, but_for=classifier.model.ends) and not classifier.model.mixes


def keep_features(
    data: MissingModalityData,
    backbone: FrozenWeights,
    tokenizer: str,
    precision: str,
    device: torch.device,
    *,
    must_keep: bool = False,
) -> None:
    """Gives the datasets what the frozen towers make of their inputs, which they then have instead.

    Args:
        tokenizer: its fingerprint.
        must_keep: where the files cannot be written, raise OSError; otherwise they are computed for this run alone.

    Raises:
        ConfigError: it is a backbone whose towers read each other.
        DataError: an input cannot be read.
    """
    of_model = [FORMAT, backbone.sha256, backbone.architecture, tokenizer, precision, PIL.__version__]
    first = next(iter(data.datasets.values()))
    windows = max(kind.most_windows for kind in first.kinds.values())
    of_model += [windows, first.group_texts] if windows > 1 else []
    digest = hashlib.sha256(repr(of_model).encode()).hexdigest()

    @cache
    def towers() -> dict[str, Tower]:
        model = family_of(data.settings.dataset).build(backbone.architecture)
        if model.mixes:
            raise ConfigError("features: in this backbone modalities read each other, so that none has its own")
        backbone.load_into(model)
        model.compute(COMPUTE_TYPES[precision])
        return model.to(device).eval().towers

    for split, dataset in data.datasets.items():
        arrow = file_sha256(dataset.path)
        path = dataset.path.with_name(f"{dataset.path.stem}_features_{digest[:16]}_{arrow[:16]}.safetensors")
        kept = _read(path)
        if kept is None:
            maker = _Maker(dataset, towers(), data.settings.num_workers, device, must_keep)
            try:
                kept = _made_once(path, maker)
            except OSError as error:  # a folder that nobody can write to
                maker.refused(path, error)
                kept = maker.make(None)
        dataset.kept = {name: x for name, x in kept.items() if not name.endswith(FEATURES)}
        counts = ", ".join(f"{' × '.join(f'{size:,}' for size in x.shape)} {name}" for name, x in dataset.kept.items())
        log.info("%s: frozen towers run once, for all epochs: %s (%s)", split, counts, path.name)


def training_batches(data: MissingModalityData, *, kept: bool) -> DataLoader[Any]:
    """The training split in order, as its missing table leaves it.

    Args:
        kept: whether inputs are what frozen towers have made of them.
    """
    dataset = data.datasets["train"].without_draws()
    dataset.kept = dataset.kept if kept else None
    return DataLoader(
        dataset,
        batch_size=data.settings.per_gpu_batchsize,
        sampler=[(0, number) for number in range(len(dataset))],  # epoch and number
        collate_fn=partial(collate, kinds_of(data.spec), once=True, kept=kept),
        num_workers=0 if kept else data.settings.num_workers,
        worker_init_fn=leave_group,
    )


@torch.no_grad()
def remember_training_split(classifier: MissingModalityClassifier, data: MissingModalityData) -> None:
    """Gives `Neighbours`, where the classifier has them, the training split."""
    if classifier.neighbours is None:
        return
    features, present, labels = [], [], []
    for batch in training_batches(data, kept=True):
        inputs = model_input(batch)
        of_batch, _ = classifier.features(inputs)
        features.append(torch.cat([of_batch[name] for name in classifier.neighbours.widths], dim=1))
        present.append(inputs.joined().present_BM)
        labels.append(batch.label)
    rows = torch.from_numpy(data.datasets["train"].row_of_sample)
    classifier.neighbours.remember(torch.cat(features), torch.cat(present), torch.cat(labels), rows)


def _made_once(path: Path, maker: "_Maker") -> dict[str, Tensor]:
    """Of several processes that ask at the same time one computes, and the others wait for it."""
    parts = path.with_name(f".{path.name}.parts")
    with waiting_lock(path.with_name(f".{path.name}.lock"), f"{path}: another process is making it; waiting for that"):
        if (kept := _read(path)) is not None:
            return kept
        parts.mkdir(exist_ok=True)
        kept = maker.make(parts)
        maker.write(path, kept)
        shutil.rmtree(parts)
        for other in path.parent.glob(f"{path.stem.rpartition('_')[0]}_{'[0-9a-f]' * 16}{path.suffix}"):
            if other != path:
                other.unlink()
                log.info("%s: of another state of the arrow file; removed", other)
    return kept


class _Maker:
    """Runs the towers on all inputs of a split, those that the missing table leaves out too."""

    def __init__(
        self, dataset: ArrowDataset, towers: dict[str, Tower], workers: int, device: torch.device, must_keep: bool
    ) -> None:
        self.dataset, self.towers, self.workers, self.device = dataset, towers, workers, device
        self.must_keep, self.writes = must_keep, True

    def make(self, parts: Path | None) -> dict[str, Tensor]:
        """All of it. What is in the folder `parts` is taken from there, and what is not is kept there."""
        made = {}
        for name, kind in self.dataset.kinds.items():
            places_n, samples_n = np.unique(kind.place_of_sample, return_index=True)
            samples_n, places_n = samples_n[places_n >= 0], places_n[places_n >= 0]
            of_parts: list[dict[str, Tensor]] = []
            title = f"{self.dataset.path.name}, {name}"
            with tqdm(total=len(samples_n), desc=title, unit=" inputs", dynamic_ncols=True, disable=None) as bar:
                for start in range(0, len(samples_n), PART):
                    path, samples_p = (parts or Path()) / f"{name}_{start}", samples_n[start : start + PART].tolist()
                    part = _read(path) if parts is not None else None
                    if part is None:
                        part = self._run(name, kind, samples_p)
                        if parts is not None:
                            self.write(path, part)
                    of_parts.append(part)
                    bar.update(len(samples_p))
            for entry in of_parts[0] if of_parts else ():
                x_nD = torch.cat([part[entry] for part in of_parts])
                made[entry] = x_nD.new_zeros(int(places_n.max()) + 1, *x_nD.shape[1:])
                made[entry][torch.from_numpy(places_n)] = x_nD
        return made

    @torch.no_grad()
    def _run(self, name: str, kind: Kind, samples: Sequence[int]) -> dict[str, Tensor]:
        def read(sample: int) -> Tensor:
            found = kind.read(int(self.dataset.row_of_sample[sample]), sample)
            assert found is not None, "texts are tokenised before"
            return found

        tower, inputs = self.towers[name], in_order(read, samples, self.workers)
        x_nD, features_nE = [], []
        while of_pass := list(islice(inputs, ROWS)):
            one_by_one = of_pass if kind.most_windows == 1 else [window for each in of_pass for window in each]
            collated = kind.collate(one_by_one)
            input_b = collated.input_b.to(self.device)
            x_bD = tower.body(tower.embed(input_b)[:, : collated.length], input_b, NO_SLOTS)
            x_nD.append(_of_inputs(x_bD, kind, of_pass))
            features_nE.append(_of_inputs(tower.end(x_bD), kind, of_pass))
        return {name: torch.cat(x_nD), name + FEATURES: torch.cat(features_nE)}

    def write(self, path: Path, tensors: dict[str, Tensor]) -> None:
        """Keeps tensors, a whole file or none."""
        if self.writes:
            try:
                with atomic_path(path) as part:
                    part.write_bytes(save(tensors))
            except OSError as error:
                self.refused(path, error)

    def refused(self, path: Path, error: OSError) -> None:
        """Raises the error where files must be kept."""
        if self.must_keep:
            raise error
        self.writes = False
        log.info("%s: cannot be kept (%s); this run computes it for itself", path, reason_of(error))


def _of_inputs(x_bD: Tensor, kind: Kind, inputs: Sequence[Tensor]) -> Tensor:
    """float32 (n, D), or of texts in windows (n, W, D), with 0 for those that one has not."""
    x_bD = x_bD.float().cpu()
    if kind.most_windows == 1:
        return x_bD
    x_nWD = x_bD.new_zeros(len(inputs), kind.most_windows, x_bD.shape[1])
    for x_WD, own in zip(x_nWD, x_bD.split([len(windows) for windows in inputs]), strict=True):
        x_WD[: len(own)] = own
    return x_nWD


def _read(path: Path) -> dict[str, Tensor] | None:
    """What is there; None where nothing is, or it is damaged."""
    try:
        return load_file(path) if path.is_file() else None
    except (SafetensorError, OSError) as error:
        log.warning("%s: not readable (%s); making it again", path, error)
        return None
