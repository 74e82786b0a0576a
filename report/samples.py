"""Test samples whose prediction depends most on a modality: what the model says with everything, and without."""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clip.metrics import THRESHOLD
from common.errors import DataError
from report.collect import LOGIT_COLUMNS, Robustness, Run, read_logits
from report.tables import Column, Table
from report.text import dataset_title, excerpt
from vilt.datasets.arrow_dataset import ArrowDataset
from vilt.images import open_rgb
from vilt.missing_tables import TYPE_NAMES

SHOWN = 24
TEXT_LENGTH = 220
THUMBNAIL_SIZE = (176, 176)
JPEG_QUALITY = 82
INPUT_TITLES = {"complete": "complete", "text missing": "without text", "image missing": "without image"}


@dataclass(frozen=True)
class Predicted:
    """One class that is predicted."""

    name: str
    probability: float
    correct: bool


@dataclass(frozen=True)
class SampleCard:
    """One test sample with its predictions."""

    rank: int
    id: str
    text: str | None
    """None where the arrow file is not there any more."""
    label: list[str]
    predictions: dict[str, list[Predicted]]
    """By the keys of INPUT_TITLES; more than one class, or none, only in multi-label data."""
    change: float
    thumbnail: bytes | None
    """A JPEG file."""
    thumbnail_size: tuple[int, int] | None


@dataclass(frozen=True)
class SampleGrid:
    """The samples of one run that change the most."""

    run: Run
    cards: list[SampleCard]
    note: str | None
    """What is missing of pictures and texts, and why."""


def probabilities(logits_NC: np.ndarray, multilabel: bool) -> np.ndarray:
    """(N, C): sigmoid for multi-label data, else softmax."""
    logits_NC = logits_NC.astype(np.float64)
    if multilabel:
        return 1 / (1 + np.exp(-np.clip(logits_NC, -700, 700)))
    powers_NC = np.exp(logits_NC - logits_NC.max(-1, keepdims=True))
    return powers_NC / powers_NC.sum(-1, keepdims=True)


def change_of(probabilities_of: dict[str, np.ndarray]) -> np.ndarray:
    """By how much losing one modality changes the class probabilities at most, (N,): max of Σ_c |p - p_complete|."""
    complete_NC = probabilities_of["complete"]
    lost = [probabilities_of[name] for name in TYPE_NAMES if name != "complete"]
    return np.max([np.abs(lost_NC - complete_NC).sum(-1) for lost_NC in lost], axis=0)


def sample_grid(run: Run, robustness: Robustness) -> SampleGrid:
    """The SHOWN samples of a run that change the most, first the largest change.

    Of a row with several texts only the text that changes the most is shown.

    Raises:
        DataError: the stored logits are damaged.
    """
    assert robustness.logits is not None
    spec = run.data
    table = read_logits(robustness.logits.path)
    names = robustness.class_names
    probabilities_of = {
        name: probabilities(_matrix(table[column], len(names)), spec.multilabel)
        for name, column in LOGIT_COLUMNS.items()
    }
    changes = change_of(probabilities_of)
    rows = table["row"].to_numpy()
    chosen: dict[int, int] = {}  # row to sample
    for index in np.argsort(-changes, kind="stable").tolist():
        if len(chosen) == SHOWN:
            break
        chosen.setdefault(int(rows[index]), index)
    dataset, note = _open_dataset(run, table)
    texts = pc.list_flatten(dataset.table[spec.text_column]) if dataset is not None else None
    cards = []
    for rank, (row, index) in enumerate(chosen.items(), start=1):
        label = table["label"][index].as_py()
        true = set(np.flatnonzero(label).tolist()) if spec.multilabel else {label}
        thumbnail = _thumbnail(dataset.table["image"][row].as_py()) if dataset is not None else None
        cards.append(
            SampleCard(
                rank=rank,
                id=table["id"][index].as_py(),
                text=excerpt(texts[table["sample"][index].as_py()].as_py(), TEXT_LENGTH) if texts is not None else None,
                label=[names[number] for number in sorted(true)],
                predictions={
                    name: _predicted(probabilities_of[name][index], true, names, spec.multilabel) for name in TYPE_NAMES
                },
                change=float(changes[index]),
                thumbnail=thumbnail[0] if thumbnail else None,
                thumbnail_size=thumbnail[1] if thumbnail else None,
            )
        )
    unreadable = [card.id for card in cards if dataset is not None and card.thumbnail is None]
    if unreadable:
        note = f"{len(unreadable)} images cannot be decoded: {', '.join(unreadable)}."
    return SampleGrid(run, cards, note)


def samples_table(grid: SampleGrid) -> Table:
    """The grid as a table."""
    return Table(
        f"samples_{grid.run.task}",
        f"Test samples of {dataset_title(grid.run.task)} in run {grid.run.tag} whose prediction changes the most "
        "where a modality is missing. ✓ marks classes that are right, ✗ those that are wrong.",
        (
            Column("rank", "No.", "number"),
            Column("id", "Sample"),
            Column("text", "Text", absent="not available"),
            Column("label", "Label"),
            *(Column(name.replace(" ", "_"), title.capitalize()) for name, title in INPUT_TITLES.items()),
            Column("change", "Change", "number"),
        ),
        [
            [
                card.rank,
                card.id,
                card.text,
                ", ".join(card.label) or "none",
                *(
                    ", ".join(f"{'✓' if p.correct else '✗'} {p.name} {p.probability:.0%}" for p in predicted) or "none"
                    for predicted in card.predictions.values()
                ),
                round(card.change, 2),
            ]
            for card in grid.cards
        ],
    )


def _matrix(column: pa.ChunkedArray, n_classes: int) -> np.ndarray:
    return pc.list_flatten(column).to_numpy().reshape(-1, n_classes)


def _predicted(
    probabilities_C: np.ndarray, true: set[int], names: tuple[str, ...], multilabel: bool
) -> list[Predicted]:
    """The predicted classes, the most probable first."""
    order = np.argsort(-probabilities_C, kind="stable")
    numbers = [n for n in order if probabilities_C[n] > THRESHOLD] if multilabel else order[:1]
    return [Predicted(names[n], float(probabilities_C[n]), int(n) in true) for n in numbers]


def _open_dataset(run: Run, logits: pa.Table) -> tuple[ArrowDataset | None, str | None]:
    """The arrow file that the logits are of, or None and why pictures and texts cannot be shown."""
    root = Path(run.config["data_root"])
    spec = run.data
    name = spec.file_name("test")
    if not _is_file(root / name):
        return None, f"Images and texts are not available: {name} is no longer in the data_root of {run.tag}."
    another = f"Images and texts are not available: {name} in the data_root of {run.tag} holds other samples."
    try:
        dataset = ArrowDataset(spec, root, "test", image_size=THUMBNAIL_SIZE[0])
    except DataError:
        return None, f"Images and texts are not available: {name} in the data_root of {run.tag} is damaged."
    return (dataset, None) if _same_samples(dataset, logits) else (None, another)


def _is_file(path: Path) -> bool:
    """Whether it is there; a path that no system has is not."""
    try:
        return path.is_file()
    except OSError:
        return False


def _same_samples(dataset: ArrowDataset, logits: pa.Table) -> bool:
    """Whether sample, row, id and label of the logits are those of the arrow file."""
    samples, rows = logits["sample"].to_numpy(), logits["row"].to_numpy()
    if len(dataset) != len(samples) or not np.array_equal(np.sort(samples), np.arange(len(samples))):
        return False
    if [dataset.sample_name(number) for number in samples.tolist()] != logits["id"].to_pylist():
        return False
    in_range = len(rows) == 0 or (rows.min() >= 0 and rows.max() < dataset.n_rows)
    return bool(in_range) and dataset.table["label"].take(pa.array(rows)).to_pylist() == logits["label"].to_pylist()


def _thumbnail(data: bytes) -> tuple[bytes, tuple[int, int]] | None:
    """The image as a small JPEG file with its width and height, or None where it cannot be decoded."""
    try:
        image = open_rgb(data)
    except Exception:  # see there; the page says which images are left out
        return None
    image.thumbnail(THUMBNAIL_SIZE)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=JPEG_QUALITY, optimize=True)
    return file.getvalue(), image.size
