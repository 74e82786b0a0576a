"""Test samples whose prediction depends most on a modality: what the model says with everything, and without."""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from common.errors import DataError
from engine.logit_store import logit_columns_of, matrix_of, read_logits
from engine.metrics import THRESHOLD
from runs.report.results import ReportRun, Robustness
from runs.report.tables import Column, Table
from runs.report.text import capital, dataset_title, excerpt, without
from vilt.datasets.arrow_dataset import ArrowDataset
from vilt.images import open_rgb

SHOWN = 24
TEXT_LENGTH = 220
THUMBNAIL_SIZE = (176, 176)
JPEG_QUALITY = 82


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
    """By missing type; more than one class, or none, only in multi-label data."""
    change: float
    thumbnail: bytes | None
    """A JPEG file."""
    thumbnail_size: tuple[int, int] | None


@dataclass(frozen=True)
class SampleGrid:
    """The samples of one run that change the most."""

    run: ReportRun
    cards: list[SampleCard]
    note: str | None
    """What is missing of pictures and texts, and why."""

    @property
    def input_titles(self) -> dict[str, str]:
        """Titles of the missing types."""
        return {name: without(name) for name in self.run.run.spec.type_names}

    @property
    def measure(self) -> str:
        """What is left out, and what the change is."""
        names = [f"the {name}" for name in reversed(self.run.run.spec.modalities)]
        lost, which = ("or", "larger of the two") if len(names) == 2 else ("and/or", "largest one")
        left_out = f"{', '.join(names[:-1])} {lost} {names[-1]}"
        return f"{left_out} is left out; change is the sum of the absolute differences, the {which}."

    def thumbnail_name(self, card: SampleCard) -> str:
        """Path of a sample's picture in the report's folder."""
        return f"thumbnails/{self.run.run.dataset}_{card.rank:02}.jpg"


def probabilities(logits_NC: np.ndarray, multilabel: bool) -> np.ndarray:
    """(N, C): sigmoid for multi-label data, else softmax."""
    logits_NC = logits_NC.astype(np.float64)
    if multilabel:
        return 1 / (1 + np.exp(-np.clip(logits_NC, -700, 700)))
    powers_NC = np.exp(logits_NC - logits_NC.max(-1, keepdims=True))
    return powers_NC / powers_NC.sum(-1, keepdims=True)


def sample_grid(run: ReportRun, robustness: Robustness) -> SampleGrid:
    """The SHOWN samples of a run that change the most, first the largest change.

    The change is the sum over classes of how far the probability moves when modalities are lost, the largest one.
    Of a row with several texts only the text that changes the most is shown.

    Raises:
        DataError: the stored logits are damaged.
    """
    assert robustness.logits is not None
    spec, names = run.run.spec, robustness.class_names
    table, _ = read_logits(robustness.logits, spec, logit_columns_of(spec))
    probabilities_TNC = np.stack(
        [probabilities(matrix_of(table[column], len(names)), spec.multilabel) for column in logit_columns_of(spec)]
    )
    changes = np.abs(probabilities_TNC[1:] - probabilities_TNC[0]).sum(-1).max(0)
    rows = table["row"].to_numpy()
    order = np.argsort(-changes, kind="stable")
    _, first_of_row = np.unique(rows[order], return_index=True)
    chosen = order[np.sort(first_of_row)][:SHOWN].tolist()
    dataset, note = _open_dataset(run, table)
    text_column, image_column = spec.column_of("text"), spec.column_of("image")
    texts = pc.list_flatten(dataset.table[text_column]) if dataset is not None and text_column else None
    cards = []
    for rank, index in enumerate(chosen, start=1):
        label = table["label"][index].as_py()
        true = set(np.flatnonzero(label).tolist()) if spec.multilabel else {label}
        image = dataset.table[image_column][int(rows[index])].as_py() if dataset is not None and image_column else None
        thumbnail = None if image is None else _thumbnail(image)
        cards.append(
            SampleCard(
                rank=rank,
                id=table["id"][index].as_py(),
                text=excerpt(texts[table["sample"][index].as_py()].as_py(), TEXT_LENGTH) if texts is not None else None,
                label=[names[number] for number in sorted(true)],
                predictions={
                    name: _predicted(probabilities_TNC[kind, index], true, names, spec.multilabel)
                    for kind, name in enumerate(spec.type_names)
                },
                change=float(changes[index]),
                thumbnail=thumbnail[0] if thumbnail else None,
                thumbnail_size=thumbnail[1] if thumbnail else None,
            )
        )
    unreadable = [card.id for card in cards if dataset is not None and image_column and card.thumbnail is None]
    if unreadable:
        note = f"{len(unreadable)} images cannot be decoded: {', '.join(unreadable)}."
    return SampleGrid(run, cards, note)


def samples_table(grid: SampleGrid) -> Table:
    """The grid as a table."""
    return Table(
        f"samples_{grid.run.run.dataset}",
        f"Test samples of {dataset_title(grid.run.run.dataset)} in run {grid.run.tag} whose prediction changes the "
        "most where a modality is missing. ✓ marks classes that are right, ✗ those that are wrong.",
        (
            Column("rank", "No.", "number"),
            Column("id", "Sample"),
            Column("text", "Text", absent="not available"),
            Column("label", "Label"),
            *(Column(name.replace(" ", "_"), capital(title)) for name, title in grid.input_titles.items()),
            Column("change", "Change", "number"),
        ),
        [
            [
                *(card.rank, card.id, card.text, ", ".join(card.label) or "none"),
                *(
                    ", ".join(f"{'✓' if p.correct else '✗'} {p.name} {p.probability:.0%}" for p in predicted) or "none"
                    for predicted in card.predictions.values()
                ),
                round(card.change, 2),
            ]
            for card in grid.cards
        ],
    )


def _predicted(
    probabilities_C: np.ndarray, true: set[int], names: tuple[str, ...], multilabel: bool
) -> list[Predicted]:
    """The predicted classes, the most probable first."""
    order = np.argsort(-probabilities_C, kind="stable")
    numbers = [n for n in order if probabilities_C[n] > THRESHOLD] if multilabel else order[:1]
    return [Predicted(names[n], float(probabilities_C[n]), int(n) in true) for n in numbers]


def _open_dataset(run: ReportRun, logits: pa.Table) -> tuple[ArrowDataset | None, str | None]:
    """The arrow file that the logits are of, or None and why pictures and texts cannot be shown."""
    root, spec = Path(run.run.config["data_root"]), run.run.spec
    name = spec.file_name("test")
    if not (root / name).is_file():
        return None, f"Images and texts are not available: {name} is no longer in the data_root of {run.tag}."
    try:
        dataset = ArrowDataset(spec, root, "test", image_size=THUMBNAIL_SIZE[0])
    except DataError:
        return None, f"Images and texts are not available: {name} in the data_root of {run.tag} is damaged."
    samples, rows = logits["sample"].to_numpy(), logits["row"].to_numpy()
    if (
        np.array_equal(np.sort(samples), np.arange(len(dataset)))
        and np.array_equal(rows, dataset.row_of_sample[samples])
        and [dataset.sample_name(number) for number in samples.tolist()] == logits["id"].to_pylist()
        and dataset.table["label"].take(pa.array(rows)).to_pylist() == logits["label"].to_pylist()
    ):
        return dataset, None
    return None, f"Images and texts are not available: {name} in the data_root of {run.tag} holds other samples."


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
