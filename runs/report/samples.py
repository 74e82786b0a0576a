"""Test samples whose prediction depends most on a modality: predictions with all modalities, and without some."""

import io
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


def sample_table(run: ReportRun, line: str) -> tuple[Table, str | None]:
    """The SHOWN samples of a run of `line`, which has stored logits, that change the most, in descending order.

    Also returns which images and texts cannot be shown, and why.

    The change is the sum over classes of the absolute change in probability when modalities are missing, at its largest
    over missing types. For a row with several texts, only the text with the largest change is shown.
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
        text: Value = absent("unavailable")
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
            classes = np.argsort(-probabilities_C, kind="stable").tolist()
            classes = [c for c in classes if probabilities_C[c] > THRESHOLD] if spec.multilabel else classes[:1]
            marks = [f"{'✓' if c in true else '✗'} {names[c]} {probabilities_C[c]:.0%}" for c in classes]
            predicted[column] = f"{probabilities_C[0]:.2f}" if numbers_alone else ", ".join(marks) or "none"
        shown = f"{true[0]:.2f}" if numbers_alone else ", ".join(names[c] for c in true) or "none"
        given = {"text": text} if text_column else {}
        rows.append({"rank": rank, "id": name, **given, "label": shown, **predicted})
        rows[-1]["change"] = f"{changes[index]:.2f}"
        if image_column:
            pictures[f"thumbnails/{key}_{rank:02}.jpg"] = picture
    if undecoded:
        note = f"{counted(len(undecoded), 'image')} cannot be decoded: {', '.join(undecoded)}."
    caption = CAPTIONS["samples"].format(dataset=dataset_title(key), run=run.tag, line=line)
    return Table(f"samples_{key}", caption, rows, {"rank": "No.", "id": "Sample", **types}, pictures), note


def _open_dataset(run: ReportRun, stored: StoredLogits) -> tuple[ArrowDataset | None, str | None]:
    """Opens the arrow file that the logits belong to; or returns None and why images and texts cannot be shown."""
    root, name = Path(run.config["data_root"]), run.spec.file_name("test")
    fault = f"Images and texts are unavailable: {name} in the data_root of {run.tag}"
    if not (root / name).is_file():
        return None, f"{fault} no longer exists."
    try:
        dataset = ArrowDataset(run.spec, root, "test", image_size=THUMBNAIL_SIZE[0])
    except DataError:
        return None, f"{fault} is damaged."
    if (
        np.array_equal(dataset.row_of_sample, stored.split.row_of_sample_N)
        and np.array_equal(dataset.label_of_sample, stored.split.labels.numpy())
        and all(dataset.sample_name(index) == name for index, name in enumerate(stored.names))
    ):
        return dataset, None
    return None, f"{fault} has other samples."


def _thumbnail(data: bytes) -> bytes | None:
    """The image as a small JPEG file, or None if it cannot be decoded."""
    try:
        image = open_rgb(data)
    except Exception:  # of many types, see `open_rgb`; the page names the images left out
        return None
    image.thumbnail(THUMBNAIL_SIZE)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=JPEG_QUALITY, optimize=True)
    return file.getvalue()
