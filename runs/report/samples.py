"""Test samples whose prediction depends most on a modality: what the model says with everything, and without."""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.errors import DataError
from common.text import counted
from engine.metrics import THRESHOLD
from runs.report.results import ReportRun
from runs.report.table import Row, Table, Value, absent
from runs.report.text import CAPTIONS, capital, dataset_title, excerpt, without
from runs.stored_results import StoredLogits
from vilt.datasets.arrow_dataset import ArrowDataset
from vilt.images import open_rgb

SHOWN = 24
TEXT_LENGTH = 220
THUMBNAIL_SIZE = (176, 176)
JPEG_QUALITY = 82


@dataclass(frozen=True)
class SampleGrid:
    """The samples of one run that change the most."""

    table: Table  # A row per sample
    pictures: dict[str, bytes | None]
    """Of the samples: JPEG files by path in the report's folder; None where there is no image to be shown. Empty of a
    dataset without images."""
    note: str | None  # what is missing of pictures and texts, and why


def sample_grid(run: ReportRun, line: str) -> SampleGrid:
    """The SHOWN samples of a run of `line`, with stored logits, that change the most, first the largest change.

    The change is the sum over classes of how far the probability moves when modalities are lost, the largest one. Of a
    row with several texts only the text that changes the most is shown.
    """
    stored = run.logits
    assert run.robustness is not None and stored is not None
    spec, names, key, split = run.spec, run.robustness.raw["class_names"], run.dataset, stored.split
    image_column, text_column = spec.column_of("image"), spec.column_of("text")
    logits_TNC = split.logits_TNC.double()
    numbers_alone = spec.label_range is not None
    probabilities = logits_TNC if numbers_alone else logits_TNC.sigmoid() if spec.multilabel else logits_TNC.softmax(-1)
    probabilities_TNC = probabilities.numpy()
    changes = np.abs(probabilities_TNC[1:] - probabilities_TNC[0]).sum(-1).max(0)
    order = np.argsort(-changes, kind="stable")
    _, first_of_row = np.unique(split.row_of_sample_N[order], return_index=True)
    dataset, note = _open_dataset(run, stored) if image_column or text_column else (None, None)
    types = {name.replace(" ", "_"): capital(without(name)) for name in spec.type_names}
    rows: list[Row] = []
    pictures: dict[str, bytes | None] = {}
    undecoded: list[str] = []
    for rank, index in enumerate(order[np.sort(first_of_row)][:SHOWN].tolist(), start=1):
        name, label = stored.names[index], split.labels[index]
        true = label.nonzero().flatten().tolist() if spec.multilabel else [label.item()]
        text: Value = absent("not available")
        picture = None
        if dataset is not None and text_column:
            content = dataset.given("text", index)
            text = absent("missing") if content is None else excerpt(content, TEXT_LENGTH)
        if dataset is not None and image_column:
            data = dataset.given("image", index)
            if data is not None and (picture := _thumbnail(data)) is None:
                undecoded.append(name)
        predicted = {}
        for column, probabilities_C in zip(types, probabilities_TNC[:, index], strict=True):
            numbers = np.argsort(-probabilities_C, kind="stable").tolist()
            numbers = [n for n in numbers if probabilities_C[n] > THRESHOLD] if spec.multilabel else numbers[:1]
            marks = [f"{'✓' if n in true else '✗'} {names[n]} {probabilities_C[n]:.0%}" for n in numbers]
            predicted[column] = f"{probabilities_C[0]:.2f}" if numbers_alone else ", ".join(marks) or "none"
        shown = f"{true[0]:.2f}" if numbers_alone else ", ".join(names[n] for n in true) or "none"
        given = {"text": text} if text_column else {}
        rows.append({"rank": rank, "id": name, **given, "label": shown, **predicted})
        rows[-1]["change"] = f"{changes[index]:.2f}"
        if image_column:
            pictures[f"thumbnails/{key}_{rank:02}.jpg"] = picture
    if undecoded:
        note = f"{counted(len(undecoded), 'image')} cannot be decoded: {', '.join(undecoded)}."
    caption = CAPTIONS["samples"].format(dataset=dataset_title(key), run=run.tag, line=line)
    return SampleGrid(Table(f"samples_{key}", caption, rows, {"rank": "No.", "id": "Sample", **types}), pictures, note)


def _open_dataset(run: ReportRun, stored: StoredLogits) -> tuple[ArrowDataset | None, str | None]:
    """The arrow file that the logits are of, or None and why pictures and texts cannot be shown."""
    root, name = Path(run.config["data_root"]), run.spec.file_name("test")
    fault = f"Images and texts are not available: {name} in the data_root of {run.tag}"
    if not (root / name).is_file():
        return None, f"{fault} is gone."
    try:
        dataset = ArrowDataset(run.spec, root, "test", image_size=THUMBNAIL_SIZE[0])
    except DataError:
        return None, f"{fault} is damaged."
    if (
        np.array_equal(dataset.row_of_sample, stored.split.row_of_sample_N)
        and np.array_equal(dataset.label_of_sample, stored.split.labels.numpy())
        and all(dataset.sample_name(number) == name for number, name in enumerate(stored.names))
    ):
        return dataset, None
    return None, f"{fault} holds other samples."


def _thumbnail(data: bytes) -> bytes | None:
    """The image as a small JPEG file, or None where it cannot be decoded."""
    try:
        image = open_rgb(data)
    except Exception:  # see there; the page says which images are left out
        return None
    image.thumbnail(THUMBNAIL_SIZE)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=JPEG_QUALITY, optimize=True)
    return file.getvalue()
