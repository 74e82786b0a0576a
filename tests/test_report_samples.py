"""The test samples that the report shows."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from runs.report import parts
from runs.report.lines import by_dataset
from runs.report.parts import section_of
from runs.report.results import read_report_runs
from runs.report.table import Table
from runs.stored_results import Robustness
from tests.conftest import Patch
from tests.report_files import (
    HOSTILE,
    PLOTS,
    TestSet,
    at,
    write_run,
)
from tests.report_parts import as_csv, dataset_of, notes_in, notes_of
from vilt.datasets.specs import DATASETS, MMIMDB_GENRES

TYPES = ("complete", "text missing", "image missing")


def samples_of(folder: Path) -> tuple[Table, str]:
    """The table of samples for the only run below a folder, and its notes."""
    part = section_of(dataset_of(folder)).parts[-1]
    shown = part.shown[0]
    assert isinstance(shown, Table)
    return shown, "".join(note.text for note in notes_in(part))


def test_samples_whose_predictions_change_most_come_first(report_runs: Path) -> None:
    table, note = samples_of(report_runs / "mmimdb" / "rep_seed0")
    test_set = TestSet()
    logits = test_set.logits(0)
    probabilities = {name: 1 / (1 + np.exp(-values.astype(float))) for name, values in logits.items()}
    change: dict[int, tuple[float, int]] = {}
    for sample, row in enumerate(test_set.rows):
        moved = [np.abs(probabilities[name][sample] - probabilities["complete"][sample]).sum() for name in TYPES[1:]]
        change[row] = max(change.get(row, (0.0, 0)), (float(max(moved)), sample))
    expected = sorted(change.values(), reverse=True)[:24]
    assert [shown["change"] for shown in table.rows] == [f"{moved:.2f}" for moved, _ in expected]
    for shown, picture, (_, sample) in zip(table.rows, table.pictures.values(), expected, strict=True):
        row, label = test_set.rows[sample], np.flatnonzero(test_set.labels[sample])
        assert shown["id"] == test_set.ids[sample]
        assert shown["text"] == PLOTS[row][sample - test_set.rows.index(row)]
        assert shown["label"] == (", ".join(MMIMDB_GENRES[number] for number in label) or "none")
        for name in TYPES:
            marks = []
            for number in np.argsort(-probabilities[name][sample]):
                if (probability := probabilities[name][sample][number]) > 0.5:
                    marks.append(f"{'✓' if number in label else '✗'} {MMIMDB_GENRES[number]} {probability:.0%}")
            assert shown[name.replace(" ", "_")] == (", ".join(marks) or "none")
        assert picture is not None
        with Image.open(io.BytesIO(picture)) as image:
            assert image.size == (88, 176)
            pixel = image.convert("L").getpixel((40, 80))
        assert isinstance(pixel, int) and abs(pixel - 8 * row) <= 2, "the picture is the film's poster"
    assert note == "" and HOSTILE in [shown["text"] for shown in table.rows]


@pytest.mark.parametrize(("task", "better"), [("mosi", "R1"), ("hatememes", "R2")])
def test_samples_are_of_the_best_run(tmp_path: Path, monkeypatch: Patch, task: str, better: str) -> None:
    """The best run has the lowest value if the metric is an error."""
    for seed, tested in ((0, 0.5), (1, 0.75)):
        write_run(tmp_path / f"{seed}", task, tested=tested, seed=seed, **at("text", 0.7))
    runs, spec = read_report_runs([tmp_path]), DATASETS[task]
    by_type = {name: {spec.monitor: 0.5} for name in spec.type_names}
    results = Robustness({"by_type": by_type, "table_seeds": [0], "baselines": {}}, cells={}, offset=None)
    for run in runs:
        monkeypatch.setitem(vars(run), "robustness", results)
        monkeypatch.setitem(vars(run), "test_set", ("", 30))
    [dataset] = by_dataset(runs)
    shown = parts.run_of_samples(dataset.headline)
    assert shown is not None and shown.tag == better


def test_single_label_samples_have_one_prediction(report_runs: Path) -> None:
    table, _ = samples_of(report_runs / "others" / "food101_seed0")
    test_set = TestSet("food101")
    for shown in table.rows:
        samples = [number for number, name in enumerate(test_set.ids) if name == shown["id"]]
        predicted = [f"dish {test_set.logits(0)['complete'][sample].argmax():03}" for sample in samples]
        mark, dish = str(shown["complete"]).rsplit(" ", 1)[0].split(" ", 1)
        assert dish in predicted and (mark == "✓") == (dish == shown["label"])


@pytest.mark.parametrize(
    "fault", ["no longer exists", "has other samples", "is damaged", "labels", "decoded", "logits"]
)
def test_missing_pictures_are_noted(tmp_path: Path, fault: str) -> None:
    run, test_set = write_run(tmp_path / "run", data_root=str(tmp_path)), TestSet()
    films = tmp_path / "mmimdb_test.arrow"
    test_set.write(run)
    if fault != "no longer exists":
        TestSet(first_id=int(fault == "has other samples")).write_films(tmp_path, PLOTS, fault == "labels")
    if fault == "is damaged":
        films.write_bytes(b"ARROW1 or so")
    if fault == "decoded":
        films.write_bytes(films.read_bytes().replace(b"\x89PNG", b"\x89BAD"))
    if fault == "logits":
        (run / "robustness" / "logits.arrow").unlink()
        assert "no logits.arrow in R1" in notes_of(run)
        return
    table, note = samples_of(run)
    assert len(table.pictures) == 24 and set(table.pictures.values()) == {None}
    texts = {str(shown["text"]) for shown in as_csv(table)}
    assert (texts == {""}) == (fault != "decoded")
    expected = {"labels": "has other samples", "decoded": "24 images cannot be decoded"}.get(fault, fault)
    assert expected in note and ("mmimdb_test.arrow in the data_root of R1" in note) == (fault != "decoded")
