"""Recordings of sensors become arrow files: what is in them, how they are divided, and what is refused."""

import zipfile
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
from vilt.utils import write_mod, write_wearables
from vilt.utils.recordings import Cut, time_split


def converted(dataset: str, raw: Path, *options: str) -> dict[str, pa.Table]:
    """By split."""
    assert make(dataset, raw, raw / "out", *options) == 0
    return {path.stem.rpartition("_")[2]: read_arrow(path) for path in (raw / "out").glob("*.arrow")}


def test_a_set_of_sensors(tmp_path: Path) -> None:
    tables = converted("sensors", write_set(tmp_path))
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
def test_no_two_neighbours_are_in_different_splits(tmp_path: Path, way: str, sizes: tuple[int, ...] | None) -> None:
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
        of_recording = {recording: split for (recording, _), split in places.items()}
        assert all(of_recording[recording] == split for (recording, _), split in places.items())
        assert len(set(of_recording.values())) == 3


def test_the_end_of_each_recording_is_held_out() -> None:
    found = [time_split(number, 20, 1) for number in range(20)]
    assert found == ["train"] * 14 + [None, "val"] + [None] + ["test"] * 3
    assert [time_split(number, 90, 1) for number in (62, 63)] == ["train", None]  # 0.7 * 90 is below 63 in binary
    assert Cut(4, 1, 4, 4).dropped == 3 and Cut(4, 2, 4, 4).dropped == 1


def test_subsequences_end_at_gaps_and_are_filled() -> None:
    found = pa.table({"recording": ["b", *"aaaaaaa"], "number": [0, 5, 0, 1, 2, 3, 4, 7]})
    assert subsequences(found, 4).tolist() == [[2, 3, 4, 5], [6, 1, 1, 1], [7, 7, 7, 7], [0, 0, 0, 0]]


def replace_line(path: Path, row: int, line: str) -> None:
    lines = path.read_text().splitlines()
    lines[row - 1] = line
    path.write_text("\n".join([*lines, ""]))


def with_nan(raw: Path) -> None:
    signals = np.load(raw / "signals.npy").astype(np.float32)
    signals[37, 1] = np.nan
    np.save(raw / "signals.npy", signals)


WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing channel": (lambda raw: replace_line(raw / "channels.csv", 6, ""), "none has 4"),
    "channel twice": (lambda raw: replace_line(raw / "channels.csv", 3, "0,acc,1,g,10,1"), "row 3: column"),
    "other rate": (lambda raw: replace_line(raw / "channels.csv", 4, "2,gyr,0,g,20,1"), "row 4: rate_hz: expected 10"),
    "no rate": (lambda raw: replace_line(raw / "channels.csv", 4, "2,gyr,0,g,0,1"), "row 4: rate_hz: expected a num"),
    "rate does not fit": (lambda raw: (raw / "spec.yaml").write_text(SPEC.replace("0.4", "0.33")), "3.3 values at 10"),
    "intervals do not fill": (lambda raw: (raw / "spec.yaml").write_text(SPEC.replace("0.4", "0.6")), "do not fill 10"),
    "unknown key": (lambda raw: (raw / "spec.yaml").write_text(SPEC + "rate: 1\n"), "found 'rate'"),
    "lengths differ": (lambda raw: np.save(raw / "labels.npy", np.zeros(5, np.int8)), "expected 720 rows"),
    "class": (lambda raw: np.save(raw / "labels.npy", np.full(720, 2, np.int8)), "labels.npy, row 0: expected 0 to 1"),
    "no number": (with_nan, "signals.npy, row 37: signals: expected a finite number"),
    "behind the end": (lambda raw: replace_line(raw / "recordings.csv", 13, "r11,s,test,700,60"), "row 13: expected"),
    "a name twice": (lambda raw: replace_line(raw / "recordings.csv", 13, "r1,s,test,660,60"), "row 13: recording"),
    "rows twice": (
        lambda raw: replace_line(raw / "recordings.csv", 13, "r11,s,test,630,60"),
        "row 13: expected rows of its own, found some that 'r10' has",
    ),
    "classes that look the same": (
        lambda raw: (raw / "classes.txt").write_text("w\N{LATIN SMALL LETTER O WITH DIAERESIS}rt\nwo\u0308rt\n"),
        "classes.txt: classes: 'w\N{LATIN SMALL LETTER O WITH DIAERESIS}rt' is listed twice",
    ),
    "classes in another encoding": (lambda raw: (raw / "classes.txt").write_bytes(b"w\xf6rt\nfast\n"), "classes.txt"),
    "split": (lambda raw: replace_line(raw / "recordings.csv", 2, "r0,s,dev,0,60"), "row 2: split: expected train or"),
    "pickle": (lambda raw: np.save(raw / "labels.npy", np.array([{}], object)), "labels.npy: not readable"),
}


def test_short_recordings_are_named_and_a_byte_order_mark_is_no_part_of_a_class(tmp_path, capsys):
    raw = write_set(tmp_path)
    (raw / "classes.txt").write_bytes(b"\xef\xbb\xbfslow\nfast\n")
    replace_line(raw / "recordings.csv", 4, "r2,s2,train,120,9")
    tables = converted("sensors", raw)
    assert len(tables["train"]) == 42 and open_spec("sensors", raw / "out", SPLITS).class_names == ("slow", "fast")
    assert "left out: 'r2'" in capsys.readouterr().out


@pytest.mark.parametrize("name", WRONG)
def test_bad_input_of_a_set_is_one_line(tmp_path: Path, capsys: Captured, name: str) -> None:
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


def test_recordings_of_mod(tmp_path: Path, monkeypatch: Patch) -> None:
    used = ("Polaris0150pm", "rs1", 1, 1, "supervised"), ("Polaris0150pm", "rs2", 0, 2, "pretrain")
    monkeypatch.setattr(write_mod, "runs", lambda: [write_mod.Listed(*of_node) for of_node in used])
    for node in ("rs1", "rs2"):
        write_recording(tmp_path, "Polaris0150pm", node, 32, 0)
    tables = converted("mod", tmp_path)
    found = {split: tables[split]["sample"].to_pylist() for split in tables}
    assert found["train"] == [f"Polaris0150pm_rs1_{number}" for number in range(10)]
    assert found["val"] == ["Polaris0150pm_rs1_11"]  # from second 23 on
    assert found["test"] == ["Polaris0150pm_rs1_13", "Polaris0150pm_rs1_14"]
    # of other nodes of a run, what is not at the time of its validation and test samples
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


def test_a_recording_of_mod_becomes_the_published_sample() -> None:
    listed = next(one for one in write_mod.runs() if one.run == "Polaris0150pm")
    node = write_mod.Node(HERE / "mod_raw" / listed.run / listed.node, listed)
    expected = torch.load(HERE / "mod_raw" / "Polaris0150pm_rs1_0.pt", weights_only=True)["data"]["shake"]
    assert node.count == 1
    for name, found in node.read(0).items():
        np.testing.assert_array_equal(found, expected[name].numpy())


def test_published_samples_of_mod(tmp_path: Path, capsys: Captured) -> None:
    for path in (HERE / "mod_samples").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tables = converted("mod", tmp_path, "--split", "published")
    found = {split: tables[split]["sample"].to_pylist() for split in tables}
    index = {name: set(write_mod._names(HERE / "mod_samples" / f"{name}_index.txt")) for name in ("train", "test")}
    assert {*found["train"], *found["val"]} == index["train"] and len(found["val"]) == 1
    assert set(found["test"]) == index["test"]
    assert "samples for test lie between those for training" in capsys.readouterr().out
    (tmp_path / "walk2_rs3_0.pt").unlink()
    assert make("mod", tmp_path, tmp_path / "out", "--split", "published") == 2
    assert "train_index.txt, row" in (said := capsys.readouterr().err) and "walk2_rs3_0.pt" in said


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        ("aud16000.csv", "loud,4", "row 5: expected a number in column 1, found 'loud'"),
        ("aud16000.csv", "nan", "row 5: audio: expected a finite number"),
        ("ehz.csv", "", "expected ehz.csv, found none"),
    ],
)
def test_bad_recordings_of_mod(tmp_path: Path, name: str, line: str, message: str) -> None:
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


def test_pamap2(tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "Protocol").mkdir()
    for subject in (101, 102, 103):
        values = np.random.default_rng(subject).normal(size=(1000, 54))
        values[:, 1] = np.repeat([0, 1, 24], [200, 450, 350])
        values[300, 5] = np.nan
        rows = [" ".join(f"{x:g}".replace("nan", "NaN") for x in of) for of in values]
        (tmp_path / "Protocol" / f"subject{subject}.dat").write_text("\n".join(rows))
    tables = converted("pamap2", tmp_path)
    assert {split: len(found) for split, found in tables.items()} == dict.fromkeys(SPLITS, 3)
    for found in tables.values():
        # 200 to 399, 400 to 599 and 800 to 999; the others cross a boundary, or are no activity
        assert found["number"].to_pylist() == [1, 2, 4] and found["label"].to_pylist() == [0, 0, 17]
        assert 0.0 in np.array(found["signal_Acc"][0].as_py())[1]
    assert "samples with missing values, now 0: train 1, val 1, test 1" in capsys.readouterr().out
    replaced = tmp_path / "Protocol" / "subject102.dat"
    replace_line(replaced, 7, "1 1 " + "inf " * 52)
    with pytest.raises(DataError, match=r"subject102\.dat, row 7: expected finite numbers"):
        write_wearables.open_raw(tmp_path, "pamap2")
    replace_line(replaced, 7, "1 8 " + "0 " * 52)
    with pytest.raises(DataError, match=r"subject102\.dat, row 7: expected an activity of PAMAP2, found 8"):
        write_wearables.open_raw(tmp_path, "pamap2")


def test_realworld_har(tmp_path: Path) -> None:
    names = {"acc": "acc", "gyr": "Gyroscope", "mag": "MagneticField", "lig": "Light"}
    for subject in (1, 2, 3):
        folder = tmp_path / f"proband{subject}" / "data"
        folder.mkdir(parents=True)
        for name, prefix in names.items():
            columns = ["attr_light"] if name == "lig" else ["attr_x", "attr_y", "attr_z"]
            times = np.arange(0, 11_000, 200 if name == "lig" else 20) + 1000
            lines = [f"{n},{time}," + ",".join(f"{time / 1000}" for _ in columns) for n, time in enumerate(times)]
            content = "\n".join([",".join(["id", "attr_time", *columns]), *lines])
            with zipfile.ZipFile(folder / f"{name}_walking_csv.zip", "w") as archive:
                archive.writestr(f"{prefix}_walking_waist.csv", content)
                archive.writestr(f"{prefix}_walking_chest.csv", "")
    tables = converted("rwhar", tmp_path)
    assert {split: len(found) for split, found in tables.items()} == dict.fromkeys(SPLITS, 2)
    light, acc = (np.array(tables["train"][f"signal_{name}"][1].as_py()) for name in ("lig", "acc"))
    assert light.shape == (1, 9, 50) and acc.shape == (3, 9, 50)
    np.testing.assert_allclose(light[0], acc[0], atol=1e-4)  # on one clock
    assert set(tables["test"]["label"].to_pylist()) == {7}
    (tmp_path / "proband2" / "data" / "mag_walking_csv.zip").unlink()
    with pytest.raises(DataError, match=r"proband2.*expected a file of mag for walking, found none"):
        write_wearables.open_raw(tmp_path, "rwhar")
