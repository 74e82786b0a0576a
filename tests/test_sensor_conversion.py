"""Conversion of sensor recordings to arrow files: contents, splits and refusals."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from common.errors import DataError
from tests.conftest import Captured, Patch
from tests.custom_files import make, read_arrow
from tests.golden_as import HERE
from tests.sensor_files import RATE, ROWS, SPEC, write_set
from vilt.datasets.arrow_dataset import ArrowDataset
from vilt.datasets.kinds import root_mean_squares
from vilt.datasets.open_spec import open_spec
from vilt.datasets.specs import DATASETS, SPLITS
from vilt.datasets.subsequences import subsequences
from vilt.utils import write_mod
from vilt.utils.recordings import Cut, time_split


def converted(dataset: str, raw: Path, *options: str) -> dict[str, pa.Table]:
    """Converts `raw`; returns the tables keyed by split."""
    assert make(dataset, raw, raw / "out", *options) == 0
    return {path.stem.rpartition("_")[2]: read_arrow(path) for path in (raw / "out").glob("*.arrow")}


def test_a_sensor_dataset_is_cut_into_samples_and_intervals(tmp_path: Path, capsys: Captured) -> None:
    tables = converted("sensors", write_set(tmp_path))
    said = capsys.readouterr().out
    assert "samples" in said and "texts" not in said
    assert {split: len(found) for split, found in tables.items()} == {"train": 48, "val": 12, "test": 12}
    spec = open_spec("sensors", tmp_path / "out", SPLITS)
    assert spec.title == "made_up" and spec.class_names == ("slow", "fast")
    shapes = {name: modality.shape for name, modality in spec.modalities.items()}
    assert shapes == {"acc": (2, 4, 4), "gyr": (2, 4, 4), "lig": (1, 4, 4)}
    dataset = ArrowDataset(spec, tmp_path / "out", "test")
    signals = np.load(tmp_path / "signals.npy") * np.float32(0.01)
    row = 7  # the second sample of the last recording
    start = 11 * ROWS + RATE
    for place in range(4):
        expected = signals[start + 2 * place : start + 2 * place + 4, 2:4].T
        np.testing.assert_allclose(dataset[0, row].inputs["gyr"][:, place], expected, rtol=1e-6)
    assert dataset.sample_name(row) == "r11_1" and int(dataset[0, row].label) == 1
    train = ArrowDataset(spec, tmp_path / "out", "train")
    values = np.stack([train[0, n].inputs["acc"].numpy() for n in range(48)]).astype(np.float64)
    assert root_mean_squares(train)["acc"] == pytest.approx(np.sqrt(np.mean(values**2)))


@pytest.mark.parametrize(
    ("way", "sizes"), [("time", (48, 0, 12)), ("subject", None), ("run", None), ("published", None)]
)
def test_adjacent_samples_are_in_the_same_split(tmp_path: Path, way: str, sizes: tuple[int, ...] | None) -> None:
    raw = write_set(tmp_path)
    if way == "time":
        other = SPEC.replace("sample: 1", "sample: 0.4").replace("0.4\ninterval_", "0.2\ninterval_")
        (raw / "spec.yaml").write_text(other)
    tables = converted("sensors", raw, "--split", way)
    places: dict[tuple[str, int], str] = {}
    for split, found in tables.items():
        assert len(found) > 0
        places |= dict.fromkeys(zip(*(found[c].to_pylist() for c in ("recording", "number")), strict=True), split)
    for (recording, number), split in places.items():
        assert places.get((recording, number + 1), split) == split
    if way != "time":
        split_of_recording = {recording: split for (recording, _), split in places.items()}
        assert all(split_of_recording[recording] == split for (recording, _), split in places.items())
        assert len(set(split_of_recording.values())) == 3


def test_a_split_by_time_holds_out_the_end_of_each_recording() -> None:
    found = [time_split(number, 20, 1) for number in range(20)]
    assert found == ["train"] * 14 + [None, "val"] + [None] + ["test"] * 3
    assert [time_split(number, 90, 1) for number in (62, 63)] == ["train", None]  # as floats, 0.7 * 90 < 63
    assert Cut(4, 1, 4, 4).dropped == 3 and Cut(4, 2, 4, 4).dropped == 1


def test_subsequences_end_at_gaps_and_are_filled() -> None:
    found = pa.table({"recording": ["b", *"aaaaaaa"], "number": [0, 5, 0, 1, 2, 3, 4, 7]})
    assert subsequences(found, 4).tolist() == [[2, 3, 4, 5], [6, 1, 1, 1], [7, 7, 7, 7], [0, 0, 0, 0]]


def replace_line(path: Path, row: int, line: str) -> None:
    lines = path.read_text().splitlines()
    lines[row - 1] = line
    path.write_text("\n".join([*lines, ""]))


def with_value(raw: Path, value: float) -> None:
    signals = np.load(raw / "signals.npy").astype(np.float64)
    signals[37, 1] = value
    np.save(raw / "signals.npy", signals)


WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing channel": (lambda raw: replace_line(raw / "channels.csv", 6, ""), "found none for column 4"),
    "channel twice": (lambda raw: replace_line(raw / "channels.csv", 3, "0,acc,1,g,10,1"), "row 3: column"),
    "other rate": (lambda raw: replace_line(raw / "channels.csv", 4, "2,gyr,0,g,20,1"), "row 4: rate_hz: expected 10"),
    "no rate": (lambda raw: replace_line(raw / "channels.csv", 4, "2,gyr,0,g,0,1"), "row 4: rate_hz: expected a num"),
    "rate does not fit": (lambda raw: (raw / "spec.yaml").write_text(SPEC.replace("0.4", "0.33")), "3.3 values at 10"),
    "intervals do not fill": (lambda raw: (raw / "spec.yaml").write_text(SPEC.replace("0.4", "0.6")), "do not fill 10"),
    "unknown key": (lambda raw: (raw / "spec.yaml").write_text(SPEC + "rate: 1\n"), "found 'rate'"),
    "lengths differ": (lambda raw: np.save(raw / "labels.npy", np.zeros(5, np.int8)), "expected 720 rows"),
    "class": (lambda raw: np.save(raw / "labels.npy", np.full(720, 2, np.int8)), "labels.npy, row 0: expected 0 to 1"),
    "no number": (lambda raw: with_value(raw, np.nan), "row 37: column 1 × scale 0.01: expected a finite"),
    "too large": (
        lambda raw: with_value(raw, 1e41),
        "row 37: column 1 × scale 0.01: expected a finite",
    ),
    "behind the end": (lambda raw: replace_line(raw / "recordings.csv", 13, "r11,s,test,700,60"), "row 13: expected"),
    "a name twice": (lambda raw: replace_line(raw / "recordings.csv", 13, "r1,s,test,660,60"), "row 13: recording"),
    "rows twice": (
        lambda raw: replace_line(raw / "recordings.csv", 13, "r11,s,test,630,60"),
        "row 13: expected rows of its own, found some that also belong to 'r10'",
    ),
    "classes that look the same": (
        lambda raw: (raw / "classes.txt").write_text("w\N{LATIN SMALL LETTER O WITH DIAERESIS}rt\nwo\u0308rt\n"),
        "classes.txt: classes: 'w\N{LATIN SMALL LETTER O WITH DIAERESIS}rt' is listed twice",
    ),
    "classes in another encoding": (lambda raw: (raw / "classes.txt").write_bytes(b"w\xf6rt\nfast\n"), "classes.txt"),
    "a blank line": (lambda raw: (raw / "classes.txt").write_text("slow\n\nfast\n"), "expected a name in row 2"),
    "some splits": (
        lambda raw: replace_line(raw / "recordings.csv", 3, "r1,s,,60,60"),
        "row 3: --split published",
    ),
    "some subjects": (lambda raw: without_splits(raw, "s2"), "row 4: --split subject: expected a subject, found none"),
    "a word": (lambda raw: rename(raw, "some"), "not any or some or both or complete or id, found 'some'"),
    "a dot": (lambda raw: rename(raw, "a.b"), "channels.csv: modalities: expected letters, digits, - and _ in a name"),
    "alike": (lambda raw: rename(raw, "ACC"), "expected 2 to 4 different names, found 'acc', 'ACC', 'lig'"),
    "split": (lambda raw: replace_line(raw / "recordings.csv", 2, "r0,s,dev,0,60"), "row 2: split: expected train or"),
    "long": (lambda raw: replace_line(raw / "recordings.csv", 2, f"r0,s,{9000 * '['},0,60"), f"found '{57 * '['}...["),
    "pickle": (lambda raw: np.save(raw / "labels.npy", np.array([{}], object)), "labels.npy: not readable"),
}


def without_splits(raw: Path, subject: str) -> None:
    text = (raw / "recordings.csv").read_text()
    (raw / "recordings.csv").write_text(re.sub(r",(train|val|test),", ",,", text).replace(f",{subject},", ",,"))


def rename(raw: Path, modality: str) -> None:
    (raw / "channels.csv").write_text((raw / "channels.csv").read_text().replace("gyr", modality))


def test_spellings_of_a_subject_are_recognised_as_one(tmp_path: Path) -> None:
    """Otherwise the two recordings of a subject could end up in different splits."""
    raw = write_set(tmp_path)
    lines = [f"r{n},{n // 2}{'.0 ' if n % 2 else ''},,{ROWS * n},{ROWS}" for n in range(12)]
    (raw / "recordings.csv").write_text("\n".join(["recording,subject,split,start,length", *lines]))
    for found in converted("sensors", raw).values():
        numbers = {int(name[1:]) for name in found["recording"].to_pylist()}
        assert numbers == {n ^ 1 for n in numbers}


def test_omissions_are_reported_and_a_byte_order_mark_is_ignored(tmp_path, capsys):
    raw = write_set(tmp_path)
    (raw / "classes.txt").write_bytes(b"\xef\xbb\xbfslow\nfast\n")
    replace_line(raw / "recordings.csv", 4, "r2,s2,train,120,9")
    tables = converted("sensors", raw)
    assert len(tables["train"]) == 42 and open_spec("sensors", raw / "out", SPLITS).class_names == ("slow", "fast")
    said = capsys.readouterr().out
    assert "left out: 'r2'" in said and "in no recording, and left out: 51 of 720 rows" in said
    assert "several splits" not in said
    replace_line(raw / "recordings.csv", 2, "r0,s11,train,0,60")
    assert sum(map(len, converted("sensors", raw, "--split", "run").values())) == 66
    converted("sensors", raw)
    assert "warning: subjects in several splits: 's11'\n" in capsys.readouterr().out
    shorter = "name: made_up\nsample: 0.4\ninterval: 0.2\nmixed_labels: false\n"
    (raw / "spec.yaml").write_text(shorter)
    np.save(raw / "labels.npy", np.arange(720) // 30 % 2)
    converted("sensors", raw, "--split", "time")
    said = capsys.readouterr().out
    assert "with several labels: 11 of 167 samples" in said and "next to another split: 23 of 167 samples" in said


@pytest.mark.parametrize("name", WRONG)
def test_invalid_sensor_files_are_refused_in_one_line(tmp_path: Path, capsys: Captured, name: str) -> None:
    raw = write_set(tmp_path)
    spoil, message = WRONG[name]
    spoil(raw)
    assert make("sensors", raw, raw / "out") == 2
    said = capsys.readouterr().err.strip()
    assert message in said and len(said.splitlines()) == 1
    assert not list(raw.glob("out/*.arrow"))


def write_recording(raw: Path, run: str, node: str, seconds: int, seed: int) -> None:
    folder = raw / run / node
    folder.mkdir(parents=True)
    draw = np.random.default_rng(seed)
    lines = "\n".join(map(str, draw.integers(-900, 900, 16000 * seconds)))
    (folder / "aud16000.csv").write_text(lines)
    (folder / "ehz.csv").write_text("".join(f"{value} 7\n" for value in draw.integers(-900, 900, 100 * seconds + 90)))


def test_mod_recordings_are_cut_and_split(tmp_path: Path, monkeypatch: Patch) -> None:
    nodes = ("Polaris0150pm", "rs1", 1, 1, "supervised"), ("Polaris0150pm", "rs2", 0, 2, "pretrain")
    monkeypatch.setattr(write_mod, "runs", lambda: [write_mod.Listed(*node) for node in nodes])
    for node in ("rs1", "rs2"):
        write_recording(tmp_path, "Polaris0150pm", node, 32, 0)
    tables = converted("mod", tmp_path)
    found = {split: tables[split]["sample"].to_pylist() for split in tables}
    assert found["train"] == [f"Polaris0150pm_rs1_{number}" for number in range(10)]
    assert found["val"] == ["Polaris0150pm_rs1_11"]  # starts at second 23
    assert found["test"] == ["Polaris0150pm_rs1_13", "Polaris0150pm_rs1_14"]
    # other nodes of a run contribute the samples outside the times of its validation and test samples
    assert found["pretrain"] == [*found["train"], *(f"Polaris0150pm_rs2_{number}" for number in range(11))]
    assert tables["pretrain"]["label"].to_pylist() == [0] * 10 + [-1] * 11
    spec = DATASETS["mod"]
    assert len(ArrowDataset(spec, tmp_path / "out", "train", pretraining=True)) == 21
    inputs = ArrowDataset(spec, tmp_path / "out", "train")[0, 3].inputs
    names = ("aud16000.csv", "ehz.csv")
    audio, seismic = (np.loadtxt(tmp_path / "Polaris0150pm" / "rs1" / name, usecols=0) for name in names)
    resampled = write_mod.at_half_rate(audio[16000:-16000], 0, 8000 * 30)
    np.testing.assert_allclose(inputs["audio"].numpy().ravel(), resampled[48000:64000], rtol=1e-5)
    np.testing.assert_array_equal(inputs["seismic"].numpy().ravel(), seismic[700:900])


def test_a_mod_recording_becomes_the_published_sample() -> None:
    listed = next(one for one in write_mod.runs() if one.run == "Polaris0150pm")
    node = write_mod.Node(HERE / "mod_raw" / listed.run / listed.node, listed)
    expected = torch.load(HERE / "mod_raw" / "Polaris0150pm_rs1_0.pt", weights_only=True)["data"]["shake"]
    assert node.count == 1
    for name, found in node.read(0).items():
        np.testing.assert_array_equal(found, expected[name].numpy())


def test_published_mod_samples_are_converted(tmp_path: Path, capsys: Captured) -> None:
    for path in (HERE / "mod_samples").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tables = converted("mod", tmp_path, "--split", "published")
    found = {split: tables[split]["sample"].to_pylist() for split in tables}
    index = {name: set(write_mod._names(HERE / "mod_samples" / f"{name}_index.txt")) for name in ("train", "test")}
    assert {*found["train"], *found["val"]} == index["train"] and len(found["val"]) == 1
    assert set(found["test"]) == index["test"]
    assert "test samples lie between training samples" in capsys.readouterr().out
    (tmp_path / "walk2_rs3_0.pt").unlink()
    assert make("mod", tmp_path, tmp_path / "out", "--split", "published") == 2
    assert "train_index.txt, row" in (said := capsys.readouterr().err) and "walk2_rs3_0.pt" in said


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        ("aud16000.csv", "loud,4", "row 5: expected a number in column 1, found 'loud'"),
        ("aud16000.csv", "nan", "row 5: audio: expected a finite float32 number"),
        ("aud16000.csv", " ", "row 5: expected a number in column 1, found"),
        ("aud16000.csv", "\n", "row 5: audio: expected a finite float32 number, found nan"),
        ("ehz.csv", "-1e39 7", "row 5: seismic: expected a finite float32 number, found -1e\\+39"),
        ("ehz.csv", "", "expected ehz.csv, found none"),
    ],
)
def test_invalid_mod_recordings_are_refused(tmp_path: Path, name: str, line: str, message: str) -> None:
    write_recording(tmp_path, "Polaris0150pm", "rs1", 8, 0)
    path = tmp_path / "Polaris0150pm" / "rs1" / name
    if line:
        replace_line(path, 5, line)
    else:
        path.unlink()
    with pytest.raises(DataError, match=message) as refused:
        for split in write_mod.open_raw(tmp_path).splits:
            for _, read in split.samples:
                read()
    assert str(path.parent) in str(refused.value)


def test_unused_parts_of_mod_are_reported(tmp_path: Path, monkeypatch: Patch) -> None:
    run = "Polaris0150pm"
    monkeypatch.setattr(write_mod, "runs", lambda: [write_mod.Listed(run, f"rs{n}", 0, 0, "pretrain") for n in (1, 2)])
    for node in ("rs1", "rs2", "rs9", "x/rs3"):
        write_recording(tmp_path, run, node, 4, 0)
    for name, count in (("aud16000.csv", 16000), ("ehz.csv", 250)):  # one second; and 2.5 seconds, while audio has 4
        path = tmp_path / run / ("rs1" if count > 250 else "rs2") / name
        path.write_text("\n".join(["1 2" if "ehz" in name else "1"] * count))
    (tmp_path / "more.zip").touch()
    said = write_mod.open_raw(tmp_path).note
    assert "shorter than a sample, and left out: 'Polaris0150pm_rs1'\n" in said
    assert "differ in length; the excess is left out: 'Polaris0150pm_rs1', 'Polaris0150pm_rs2'" in said
    assert f"and left out: '{run}/rs9', '{run}/x/rs3', 'more.zip'" in said


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("x/train_index.txt", "", "x/train_index.txt: expected one file of this name, found .*train_index.txt too"),
        ("x/walk2_rs3_0.pt", "", "x/walk2_rs3_0.pt: expected one file of this name"),
        (
            "test_index.txt",
            "/a/walk2_rs3_9.pt\n/a/Polaris0150pm_rs1_1.pt",
            "test_index.txt, row 2: Polaris0150pm_rs1",
        ),
        ("test_index.txt", "/a/tank_rs3_9.pt", "test_index.txt, row 1: tank_rs3_9: expected one of 'Polaris'"),
    ],
)
def test_contradictory_index_files_are_refused(tmp_path: Path, file: str, content: str, message: str) -> None:
    for path in (HERE / "mod_samples").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(content)
    with pytest.raises(DataError, match=message):
        write_mod.open_raw(tmp_path, "published")
