"""Conversion of PAMAP2 and RealWorld-HAR to arrow files: contents and refusals."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest

from common.errors import DataError
from engine.items import read_items
from tests.conftest import Captured
from tests.test_sensor_conversion import converted, replace_line
from vilt.datasets.specs import DATASETS, SPLITS
from vilt.utils import write_wearables


def write_pamap2(raw: Path) -> Path:
    (raw / "Protocol").mkdir()
    for subject in (101, 102, 103):
        values = np.random.default_rng(subject).normal(size=(1000, 54))
        values[:, 0] = 5 + np.arange(1000) / 100
        values[:, 1] = np.repeat([0, 1, 24], [200, 450, 350])
        values[300, 5] = np.nan
        rows = [" ".join(f"{x:g}".replace("nan", "NaN") for x in row) for row in values]
        (raw / "Protocol" / f"subject{subject}.dat").write_text("\n".join(rows))
    return raw


def test_pamap2_is_cut_into_samples(tmp_path: Path, capsys: Captured) -> None:
    write_pamap2(tmp_path)
    tables = converted("pamap2", tmp_path)
    assert {split: len(found) for split, found in tables.items()} == dict.fromkeys(SPLITS, 3)
    for found in tables.values():
        # rows 200 to 399, 400 to 599 and 800 to 999; other samples cross a boundary or have no activity
        assert found["number"].to_pylist() == [1, 2, 4] and found["label"].to_pylist() == [0, 0, 17]
        assert 0.0 in np.array(found["signal_Acc"][0].as_py())[1]
    said = capsys.readouterr().out
    assert "samples with missing values, now 0: train 1, val 1, test 1" in said and "6 of 15 samples" in said


def test_pamap2_samples_with_missing_rows_are_left_out(tmp_path: Path) -> None:
    path = write_pamap2(tmp_path) / "Protocol" / "subject101.dat"
    lines = path.read_text().splitlines()
    lines[220] = lines[220].replace(lines[220].split()[0], "NaN", 1)
    del lines[450]
    path.write_text("\ufeff" + "\r\n".join(lines))
    raw = write_wearables.open_raw(tmp_path, "pamap2", "subject")
    numbers = {row["number"] for split in raw.splits for row in (read() for _, read in split.samples)}
    first = [row for split in raw.splits for row in (read() for _, read in split.samples) if "101" in row["sample"]]
    assert numbers == {1, 2, 4} and first == []  # 999 rows: 4 samples, each with a boundary or a gap


@pytest.mark.parametrize(
    ("row", "line", "message"),
    [
        (7, "1 1 " + "inf " * 52, "row 7: column 5: expected a finite float32 number, found inf"),
        (7, "1 8 " + "0 " * 52, "row 7: expected a PAMAP2 activity, found 8"),
        (7, "1 1 " + "0 " * 20, "row 7: expected 54 values, found 22"),
        (7, "", "row 7: expected 54 values, found 0"),
        (7, "1 1 " + "0 " * 53, "row 7: expected 54 values, found 55"),
        (7, "1,1" + ",0" * 52, "row 7: expected 54 values, found 1"),
    ],
)
def test_invalid_pamap2_rows_are_refused(tmp_path: Path, row: int, line: str, message: str) -> None:
    path = write_pamap2(tmp_path) / "Protocol" / "subject102.dat"
    replace_line(path, row, line)
    with pytest.raises(DataError, match=r"subject102\.dat, " + message):
        write_wearables.open_raw(tmp_path, "pamap2")


def test_invalid_pamap2_files_are_refused(tmp_path: Path) -> None:
    path = write_pamap2(tmp_path) / "Protocol" / "subject102.dat"
    text = path.read_text()
    (tmp_path / "Protocol" / ".DS_Store").touch()
    path.write_text("\n".join(text.splitlines()[::2]))
    with pytest.raises(DataError, match=r"102\.dat, row 2: expected a time .* 0\.01 s after .*, found 0\.02 s"):
        write_wearables.open_raw(tmp_path, "pamap2")
    path.with_suffix(".zip").write_text(text)
    with pytest.raises(DataError, match=r"Protocol: expected files subject101\.dat .*, found subject102\.zip"):
        write_wearables.open_raw(tmp_path, "pamap2")


RWHAR_NAMES = {"acc": "acc", "gyr": "Gyroscope", "mag": "MagneticField", "lig": "Light"}


def write_rwhar(raw: Path) -> Path:
    names = RWHAR_NAMES
    for subject in (1, 2, 3):
        folder = raw / f"proband{subject}" / "data"
        folder.mkdir(parents=True)
        for name, prefix in names.items():
            columns = ["attr_light"] if name == "lig" else ["attr_x", "attr_y", "attr_z"]
            times = np.arange(0, 11_000, 200 if name == "lig" else 20) + 1000
            lines = [f"{n},{time}," + ",".join(f"{time / 1000}" for _ in columns) for n, time in enumerate(times)]
            content = "\n".join([",".join(["id", "attr_time", *columns]), *lines])
            with zipfile.ZipFile(folder / f"{name}_walking_csv.zip", "w") as archive:
                archive.writestr(f"{prefix}_walking_waist.csv", content)
                archive.writestr(f"{prefix}_walking_chest.csv", "")
    return raw


def zipped(name: str, content: str | bytes) -> bytes:
    with zipfile.ZipFile(file := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    return file.getvalue()


def test_realworld_har_is_cut_into_samples(tmp_path: Path) -> None:
    write_rwhar(tmp_path)
    tables = converted("rwhar", tmp_path)
    assert {split: len(found) for split, found in tables.items()} == dict.fromkeys(SPLITS, 2)
    light, acc = (np.array(tables["train"][f"signal_{name}"][1].as_py()) for name in ("lig", "acc"))
    assert light.shape == (1, 9, 50) and acc.shape == (3, 9, 50)
    np.testing.assert_allclose(light[0], acc[0], atol=1e-4)  # on a common clock
    assert set(tables["test"]["label"].to_pylist()) == {7}
    (tmp_path / "proband2" / "data" / "mag_walking_csv.zip").unlink()
    with pytest.raises(DataError, match=r"proband2.*expected a file of mag for walking, found none"):
        write_wearables.open_raw(tmp_path, "rwhar")


def test_realworld_har_may_have_gaps_and_nested_archives(tmp_path: Path, capsys: Captured) -> None:
    """With reordered columns, times that go back and a gap, the samples outside the gap are the same."""
    expected = converted("rwhar", write_rwhar(tmp_path))
    capsys.readouterr()
    for path in sorted(tmp_path.glob("proband1/data/*.zip")):
        sensor, prefix = path.name[:3], RWHAR_NAMES[path.name[:3]]
        with zipfile.ZipFile(path) as archive:
            rows = [line.split(",") for line in archive.read(f"{prefix}_walking_waist.csv").decode().splitlines()]
        del rows[20 if sensor == "lig" else 1 : 30 if sensor == "lig" else 1]  # light is recorded only when it changes
        if sensor == "gyr":
            rows[100:200] = rows[199:99:-1]
        if sensor == "mag":
            del rows[400:460]
        content = "\r\n".join(",".join(reversed(row)) for row in rows)
        inner = zipped(f"{prefix}_walking_waist.csv", "\ufeff" + content)
        path.with_suffix(".ZIP").write_bytes(zipped(f"x/{path.name}", inner))
        path.unlink()
    found = converted("rwhar", tmp_path)
    said = capsys.readouterr().out
    assert "times go back or repeat; sorted: 'proband1_walking'" in said and "1 of 6 samples" in said
    for split, table in expected.items():
        kept = [row for row in table.to_pylist() if row["sample"] != "proband1_walking_1"]
        assert [row["sample"] for row in found[split].to_pylist()] == [row["sample"] for row in kept]
        for row, like in zip(found[split].to_pylist(), kept, strict=True):
            for name in ("acc", "gyr", "mag", "lig"):
                np.testing.assert_allclose(row[f"signal_{name}"], like[f"signal_{name}"], atol=1e-4)


HEADER = "id,attr_time,attr_x,attr_y,attr_z\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            HEADER.replace("attr_x", "x") + "1,2,3,4,5",
            "expected rows of attr_time and attr_x, attr_y, attr_z, found",
        ),
        (HEADER, "expected rows of .*, found none"),
        ("", "No columns"),
        (HEADER + "1,2,3,4,5\n2,22,3,4", "row 3: attr_z: expected a finite float32 number, found nan"),
        (HEADER + "1,2,3,4,5\n\n2,22,3,4,oops", "row 3: attr_time: .*, found nan"),
        (HEADER + "1,2,3,4,5\n2,22,oops,4,5", "row 3: attr_x: .*, found 'oops'"),
        (HEADER + "1,2,3,4,-1e39", "row 2: attr_z: .*, found -1e\\+39"),
        (HEADER + "1,2,3,4,5,6\n2,22,3,4,5,6", "row 2: more values than in the header"),
        (HEADER + "1,2,3,4,5\n2,2.02,3,4,5", "attr_time: expected milliseconds, in rows about 20 apart, found 0.02"),
    ],
)
def test_invalid_realworld_har_tables_are_refused(tmp_path: Path, content: str, message: str) -> None:
    path = write_rwhar(tmp_path) / "proband2" / "data" / "acc_walking_csv.zip"
    path.write_bytes(zipped("acc_walking_waist.csv", content))
    with pytest.raises(DataError, match=r"acc_walking_csv\.zip \(acc_walking_waist\.csv\).*" + message):
        write_wearables.open_raw(tmp_path, "rwhar")


def test_invalid_realworld_har_files_are_refused(tmp_path: Path) -> None:
    path = write_rwhar(tmp_path) / "proband2" / "data" / "acc_walking_csv.zip"
    content = path.read_bytes()

    def refused(message: str) -> None:
        with pytest.raises(DataError, match=message):
            write_wearables.open_raw(tmp_path, "rwhar")

    damaged = bytearray(zipped("acc_walking_waist.csv", HEADER * 99))
    damaged[60:75] = range(15)
    encrypted = bytearray(content)
    encrypted[encrypted.find(b"PK\1\2") + 8] |= 1
    for wrong, message in ((damaged, "cannot be read"), (encrypted, "password"), (b"PK", "not readable as an archive")):
        path.write_bytes(wrong)
        refused(rf"acc_walking_csv\.zip.*{message}")
    path.write_bytes(content)
    (path.parent / "acc_walking_waist.csv").write_text(HEADER)
    refused(r"acc_walking_waist\.csv: expected one file of acc for walking, also found .*acc_walking_csv\.zip")
    (path.parent / "acc_walking_waist.csv").unlink()
    (tmp_path / "proband4").mkdir()
    refused(r"proband4: expected waist files, .*found none")
    (tmp_path / "proband4").rmdir()
    (tmp_path / "proband4.zip").touch()
    refused(r"proband4\.zip: expected a folder, found a file")


def test_modalities_under_unknown_names_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sample = np.zeros((3, 9, 40), np.float32)
    np.save(tmp_path / "a.npy", sample)
    np.savez(tmp_path / "in.npz", acc=[sample], Gyro=[sample], magnet=[sample], id=["x"])
    (tmp_path / "in.csv").write_text("id,ACC,Gyro,magnet\nx,a.npy,a.npy,a.npy\n")
    for name, said in (("in.csv", "Mag; not read: 'magnet'"), ("in.npz", "Acc or Mag; not read: 'acc', 'magnet'")):
        caplog.clear()
        [item] = read_items(tmp_path / name, DATASETS["pamap2"])
        assert "Gyro" in item.inputs and caplog.messages == [f"input={tmp_path / name}: no sample has {said}"]
