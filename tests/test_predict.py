"""Predictions equal those of the evaluation, in whatever form samples come; invalid samples are refused."""

import csv
import io
import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file

from common.errors import BackboneError, CheckpointError, ConfigError, DataError
from engine.checkpoint import read_checkpoint
from engine.decision import best_offset
from engine.exported import shared_name
from engine.items import Item, read_items
from engine.open_model import precision_of
from engine.predict import Predictor, load_model
from run import command_line
from runs.export import export
from runs.start import commit
from tests.conftest import Captured, Patch, Workspace, call, error_line, read_csv, read_json
from tests.custom_files import read_arrow
from tests.data_files import LOGIT_COLUMNS, TYPE_NAMES
from vilt.datasets.arrow_dataset import ArrowDataset
from vilt.datasets.kinds import ImageKind, InputFormat
from vilt.datasets.specs import DATASETS, MMIMDB_GENRES
from vilt.missing_tables import MissingPattern, load_missing_table

FILMS = DATASETS["mmimdb"]


@pytest.fixture(scope="module")
def trained(fitted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with its stored logits of the test split for each missing type."""
    best = Path(shutil.copytree(fitted, tmp_path_factory.mktemp("predicting") / "version_0")) / "best.ckpt"
    assert measure(best) == 0
    return best


def measure(place: Path) -> int:
    small = ("precision=32", "num_workers=0", "per_gpu_batchsize=4", "bootstrap=0", "robustness_seeds=[0]")
    return call("robustness", f"load_path={place}", *small)


@pytest.fixture(scope="module")
def model(trained: Path) -> Predictor:
    return load_model(trained)


class Films:
    """The test split: for each sample the bytes of its image, its text, and its logits for each missing type."""

    def __init__(self, workspace: Workspace, trained: Path) -> None:
        rows = read_arrow(workspace.arrow / "mmimdb_test.arrow").to_pylist()
        stored = read_arrow(trained.parent / "robustness" / "logits.arrow")
        self.images = [row["image"] for row in rows for _ in row["plots"]]
        self.texts = [text for row in rows for text in row["plots"]]
        self.logits = [torch.tensor(stored[name].to_pylist()) for name in LOGIT_COLUMNS]
        assert len(self.logits[0]) == len(self.texts)


@pytest.fixture(scope="module")
def films(workspace: Workspace, trained: Path) -> Films:
    return Films(workspace, trained)


def run_predict(trained: Path, *options: str) -> int:
    return call("predict", f"load_path={trained}", "precision=32", "num_workers=0", *options)


def assert_predicted(found: Iterable[float], logits: torch.Tensor) -> None:
    assert torch.allclose(torch.tensor([*found]), logits.sigmoid(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("missing_type", [0, 1, 2])
def test_probabilities_equal_those_of_the_evaluation(model, films, tmp_path, missing_type):
    paths = [tmp_path / f"{number}.jpg" for number in range(len(films.images))]
    for path, data in zip(paths, films.images, strict=True):
        path.write_bytes(data)
    images, texts = None if missing_type == 2 else paths, None if missing_type == 1 else films.texts
    for one, logits in zip(model.predict(images, texts, batch_size=5), films.logits[missing_type], strict=True):
        assert_predicted(one.probabilities.values(), logits)
        assert one.missing == TYPE_NAMES[missing_type] and tuple(one.probabilities) == MMIMDB_GENRES
        assert one.labels == tuple(name for name, value in one.probabilities.items() if value > model.threshold)


def test_one_batch_may_mix_samples_with_different_modalities(model: Predictor, films: Films) -> None:
    opened = [Image.open(io.BytesIO(data)) for data in films.images[:3]]
    found = model.predict(images=[opened[0], None, opened[2]], texts=[films.texts[0], films.texts[1], None])
    for number, missing_type in enumerate((0, 2, 1)):
        assert_predicted(found[number].probabilities.values(), films.logits[missing_type][number])
        assert found[number].missing == TYPE_NAMES[missing_type]


def test_the_decision_threshold_is_chosen_on_the_validation_split(workspace, trained, model, tmp_path):
    """The offset saved in the checkpoint is the best one on the validation split with its missing table."""
    data = ArrowDataset(FILMS, workspace.arrow, "val", 32)
    pattern = MissingPattern("both", 0.7, 0.5, 0)
    data.missing_table = load_missing_table(workspace.root / "missing_tables", "mmimdb", "val", pattern, data.n_rows)
    images: list[Any] = []
    texts: list[Any] = []
    for number, missing_type in enumerate(data.missing_type_of_sample):
        image, text = data.given("image", number), data.given("text", number)
        images.append(None if missing_type == 2 else Image.open(io.BytesIO(image)))
        texts.append(None if missing_type == 1 else text)
    probability = torch.tensor([list(one.probabilities.values()) for one in model.predict(images, texts)])
    offset = read_checkpoint(trained).offset
    assert offset == pytest.approx(best_offset(probability.double().logit(), torch.from_numpy(data.label_of_sample)))
    content = torch.load(trained, weights_only=True)
    for changed, threshold in ((None, 0.5), (2.0, torch.tensor(-2.0).sigmoid().item()), (800.0, 0.0)):
        content["rep"]["offset"] = changed
        torch.save(content, tmp_path / "other.ckpt")
        other = load_model(tmp_path / "other.ckpt")
        assert other.threshold == pytest.approx(threshold)
        [found] = other.predict(texts=["A ghost story."])
        assert found.labels == tuple(name for name, value in found.probabilities.items() if value > threshold)
    content["rep"]["offset"] = "0.5"
    torch.save(content, tmp_path / "other.ckpt")
    with pytest.raises(CheckpointError, match=r"offset: expected a number, found '0\.5'"):
        load_model(tmp_path / "other.ckpt")


@pytest.mark.parametrize("precision", ["bf16-mixed", 32, 16])
def test_precisions_are_named_like_the_option(trained, model, films, precision):
    found = load_model(trained, device="cpu", precision=precision).predict(texts=films.texts[:2])
    expected = model.predict(texts=films.texts[:2])
    for name, probability in expected[1].probabilities.items():
        assert found[1].probabilities[name] == pytest.approx(probability, abs=0 if "32" in str(precision) else 0.02)


@pytest.mark.parametrize(
    ("trained_in", "default", "on_gpu", "expected", "said"),
    [
        (["32-true"], "bf16-mixed", False, "32-true", "as in training; bf16-mixed is the default"),
        (["bf16-mixed", "bf16-mixed"], "32-true", False, "bf16-mixed", "as in training"),
        (["16-mixed"], "bf16-mixed", True, "16-mixed", "as in training"),
        (["16-mixed"], "32-true", False, "32-true", "a CPU cannot compute in it"),
        (["32-true", "bf16-mixed"], "32-true", False, "32-true", "the checkpoints differ"),
        (["32-true", None], "32-true", False, "32-true", ""),
        ([None], "bf16-mixed", False, "bf16-mixed", ""),
    ],
)
def test_models_are_evaluated_in_the_precision_they_were_trained_in(
    trained: Path,
    caplog: pytest.LogCaptureFixture,
    trained_in: list[str | None],
    default: str,
    on_gpu: bool,
    expected: str,
    said: str,
) -> None:
    checkpoint = read_checkpoint(trained)
    assert checkpoint.training is not None and checkpoint.training.precision == "32-true"
    several = [replace(checkpoint, training=replace(checkpoint.training, precision=one)) for one in trained_in]
    with caplog.at_level("INFO", "rep"):
        assert precision_of(several, default, on_gpu=on_gpu) == expected
    assert said in caplog.text and bool(caplog.records) == bool(said)


def test_evaluation_and_prediction_keep_the_training_precision_on_other_machines(
    workspace: Workspace, trained: Path, films: Films, tmp_path: Path, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    options = [f"load_path={trained}", "test_only=True", "test_exp_name=t", f"log_dir={tmp_path}"]
    command = [option for option in workspace.command(*options) if option != "precision=32"]
    assert command_line(command) == 0
    assert read_json(tmp_path / "t" / "version_0" / "test_results.json")["precision"] == "32-true"
    cells = ("bootstrap=0", "robustness_seeds=[0]")
    assert (
        command_line([command[0], "robustness", *command[1:], *cells]) == 0
    )  # uses the stored logits, of precision 32
    table, output = tmp_path / "t.jsonl", tmp_path / "p.jsonl"
    table.write_text("".join(json.dumps({"text": text}) + "\n" for text in films.texts))
    for given, close in (((), 1e-6), (("precision=bf16",), 0.1)):
        places = (f"load_path={trained}", f"input={table}", f"output={output}", "num_workers=0")
        assert call("predict", *places, *given) == 0
        found = [[*row["probabilities"].values()] for row in jsonl_of(output)]
        away = (torch.tensor(found) - films.logits[2].sigmoid()).abs().max()
        assert away < close and (away > 1e-6) == bool(given)


def test_unknown_precisions_are_refused(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="precision: expected 32, 16 or bf16, found 'fp8'"):
        load_model(trained, precision="fp8")
    with pytest.raises(ConfigError, match="device: expected an available one, such as cpu, found 'gpu'"):
        load_model(trained, device="gpu")
    content = torch.load(trained, weights_only=True)
    content["rep"]["training"]["precision"] = "fp8"
    torch.save(content, tmp_path / "other.ckpt")
    with pytest.raises(CheckpointError, match="precision: expected 32, 16 or bf16, found 'fp8'"):
        load_model(tmp_path / "other.ckpt")


@pytest.mark.parametrize(
    ("given", "fact"),
    [
        ({"texts": "a text"}, "texts: expected a list, found str"),  # not one sample for each character
        ({"images": Path("a.png")}, "images: expected a list, found "),
        ({"texts": [float("nan")]}, "sample 0: expected image or text"),
        ({"texts": [" "]}, "sample 0: expected image or text"),
        ({"texts": [3]}, "sample 0: text: cannot be read: expected a text, found int"),
        ({"images": [b"GIF"]}, "sample 0: image: cannot be read: expected a path or a Pillow image, found bytes"),
        ({"images": [None], "texts": ["a", "b"]}, "expected as many images as texts, found 1 and 2"),
        ({"images": [None] * 2, "texts": ["a", None]}, "sample 1: expected image or text, found none of them"),
        ({"images": [Path("large.jpg")]}, "sample 0: image .*large.jpg: cannot be read: 68,157,440 bytes, at most"),
    ],
)
def test_invalid_inputs_are_refused(model, given, fact, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("large.jpg").touch()
    os.truncate("large.jpg", 65 * 2**20)
    with pytest.raises(DataError, match=fact):
        model.predict(**given)
    assert model.predict() == [] and model.predict(images=[], texts=[]) == []


def jsonl_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def write_table(folder: Path, films: Films, suffix: str) -> Path:
    (folder / "posters").mkdir(parents=True)
    rows: list[dict[str, str | None]] = []
    for number, (image, text) in enumerate(zip(films.images, films.texts, strict=True)):
        (folder / "posters" / f"ünïcode {number}.jpg").write_bytes(image)
        image_path = f"posters/ünïcode {number}.jpg" if number % 3 != 2 else None
        rows.append({"id": f"film {number}", "image": image_path, "text": text if number % 3 != 1 else None})
    path = folder / f"films{suffix}"
    if suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    else:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["text", "id", "image"], delimiter="\t" if suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


@pytest.mark.parametrize(("suffix", "output"), [(".csv", "csv"), (".tsv", "jsonl"), (".jsonl", "csv")])
def test_a_table_of_samples(trained, model, films, tmp_path, capsys, suffix, output):
    table = write_table(tmp_path / "in", films, suffix)
    target = tmp_path / "out" / f"found.{output}"
    assert run_predict(trained, f"input={table}", f"output={target}", "per_gpu_batchsize=4") == 0
    if output == "csv":
        rows: list[dict[str, Any]] = read_csv(target)
        probabilities = [[float(row[f"p({name})"]) for name in MMIMDB_GENRES] for row in rows]
        labels = [tuple(filter(None, row["labels"].split("|"))) for row in rows]
    else:
        rows = jsonl_of(target)
        probabilities = [list(row["probabilities"].values()) for row in rows]
        labels = [tuple(row["labels"]) for row in rows]
    assert [row["id"] for row in rows] == [f"film {n}" for n in range(len(films.texts))]
    for number, row in enumerate(rows):
        missing_type = (0, 1, 2)[number % 3]
        logits = films.logits[missing_type][number]
        assert row["missing"] == TYPE_NAMES[missing_type]
        assert_predicted(probabilities[number], logits)
        above = (name for name, x in zip(MMIMDB_GENRES, logits.sigmoid(), strict=True) if x > model.threshold)
        assert labels[number] == tuple(above)
    said = capsys.readouterr().out
    assert f"above a probability of {model.threshold:.3f}" in said
    assert f"{len(rows)} predictions, written to {target}" in said and "film 4" in said and "film 5" not in said


@pytest.mark.parametrize(
    ("file", "content", "ids"),
    [("in.csv", "text\none\n\n two\n", ["2", "4"]), ("in.jsonl", '{"text": "one"}\n{"text": "two"}\n', ["1", "2"])],
)
def test_without_ids_samples_are_called_by_their_lines(tmp_path: Path, file: str, content: str, ids: list[str]) -> None:
    """As docs/evaluation.md says."""
    (tmp_path / file).write_text(content)
    assert [item.id for item in read_items(tmp_path / file, FILMS)] == ids


def test_a_folder_of_images_and_texts(trained: Path, films: Films, tmp_path: Path, capsys: Captured) -> None:
    folder = tmp_path / "in"
    (folder / "more").mkdir(parents=True)
    (folder / "film10.JPG").write_bytes(films.images[0])
    (folder / "film10.txt").write_text(films.texts[0], "utf-8")
    (folder / "film9.jpg").write_bytes(films.images[1])
    (folder / "more" / "plot.txt").write_text("\ufeff" + films.texts[2], "utf-8")
    (folder / "notes.md").write_text("not a sample")
    assert run_predict(trained, f"input={folder}", f"output={tmp_path / 'found.jsonl'}") == 0
    assert "left out" in (said := capsys.readouterr().err) and "'notes.md'" in said
    rows = jsonl_of(tmp_path / "found.jsonl")
    expected = [("film9", "text missing"), ("film10", "complete"), ("more/plot", "image missing")]
    assert [(row["id"], row["missing"]) for row in rows] == expected
    for row, (number, missing_type) in zip(rows, ((1, 1), (0, 0), (2, 2)), strict=True):
        assert_predicted(row["probabilities"].values(), films.logits[missing_type][number])


def test_workers_give_the_same_predictions(model: Predictor, films: Films, tmp_path: Path) -> None:
    items = read_items(write_table(tmp_path / "in", films, ".csv"), FILMS)
    alone = list(model.predict_items(items, batch_size=4))
    assert list(model.predict_items(items, batch_size=4, workers=2)) == alone


def test_a_single_label_model_names_one_class(workspace: Workspace, golden_arrow: Path, tmp_path: Path) -> None:
    """Food-101's class names come from its arrow files by way of the checkpoint."""
    options = ("max_epoch=1", "test_after_fit=False", "batch_size=2", "per_gpu_batchsize=2")
    best = workspace.train("food", *options, log_dir=tmp_path, task="food101", data_root=golden_arrow) / "best.ckpt"
    model = load_model(best)
    found = model.predict(texts=["apple pie"])[0]
    assert sum(found.probabilities.values()) == pytest.approx(1, abs=1e-5) and len(found.probabilities) == 101
    assert found.labels == (max(found.probabilities, key=lambda name: found.probabilities[name]),)
    assert tuple(found.probabilities) == read_checkpoint(best).class_names
    model._classifier = lambda batch: 1e-10 * torch.eye(101)[7:8]  # type: ignore[assignment]  # all probabilities round to the same value
    assert model.predict(texts=["apple pie"])[0].labels == model.class_names[7:8]
    assert run_predict(best, f"input={write_text(tmp_path)}", f"output={tmp_path / 'found.csv'}") == 0


def write_text(folder: Path) -> Path:
    path = folder / "one.jsonl"
    path.write_text('{"text": "apple pie", "id": 7}\n')
    return path


def test_a_checkpoint_without_class_names_gets_those_of_the_dataset(trained: Path, tmp_path: Path) -> None:
    content = torch.load(trained, weights_only=True)
    del content["rep"]["class_names"]
    torch.save(content, tmp_path / "old.ckpt")
    assert load_model(tmp_path / "old.ckpt").class_names == MMIMDB_GENRES
    content["rep"]["class_names"] = ["one", "two"]
    torch.save(content, tmp_path / "wrong.ckpt")
    with pytest.raises(CheckpointError, match="class_names: expected 23, found 2"):
        load_model(tmp_path / "wrong.ckpt")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("in.csv", "", "expected at least one sample, found none"),
        ("in.csv", "title,year\na,b\n", "in.csv, row 2: expected the columns 'image', 'text' or both, found 'title'"),
        ("in.csv", "text,image\nx,  \n ,\t\n", "in.csv, row 3: expected image or text, found none of them"),
        ("in.csv", "text,image\nx,nowhere.jpg\n", "row 2: image {top}/nowhere.jpg: cannot be read: No such"),
        ("in.csv", "text,image\nx,in.csv\n", "row 2: image {top}/in.csv: cannot be read: not an image"),
        ("in.csv", f"text,image\nx,{'n' * 9000}\n", "nnn…: cannot be read: File name too long"),
        ("in.csv", "text,image\nx\n", "in.csv, row 2: expected 2 values, as in the header, found 1"),
        ("in.csv", "text,text\nx,y\n", "in.csv, row 1: the column 'text' is repeated"),
        ("in.csv", b"text\n\xff\n", "in.csv is not valid UTF-8"),
        ("in.jsonl", '{"text": ["a"]}\n', 'in.jsonl, row 1: text: expected a text, found ["a"]'),
        ("in.jsonl", '{"text": "a"}\n{"text": "b"\n', "in.jsonl, row 2: not valid JSON in UTF-8"),
        ("in.jsonl", '["a"]\n', "in.jsonl, row 1: expected an object, found a list"),
        ("in.jsonl", '{"plot": "a"}\n', "in.jsonl, row 1: expected the columns 'image', 'text' or both, found 'plot'"),
        ("in.xlsx", "", "expected a folder of images, or a .csv, .tsv or .jsonl file"),
    ],
)
def test_invalid_samples_are_refused(trained, tmp_path, capsys, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert run_predict(trained, f"input={tmp_path / name}", f"output={tmp_path / 'found.csv'}") == 2
    assert message.format(top=tmp_path) in error_line(capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == [name]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("input=nowhere", "a folder of images, or a .csv, .tsv or .jsonl file, found nothing there"),
        ("input=nowhere.csv", "nowhere.csv cannot be read: No such file or directory"),
        ("input=None", "predict: expected a checkpoint and samples"),
        ("load_path=nowhere.ckpt", "nowhere.ckpt"),
        ("output=found.xlsx", "output: expected a .csv or .jsonl file, found 'found.xlsx'"),
        ("output={top}/one.jsonl/found.csv", "output={top}/one.jsonl/found.csv: cannot be written"),
        ("per_gpu_batchsize=0", "per_gpu_batchsize: expected an integer of at least 1, found 0"),
        ("vit=nowhere", "vit=nowhere"),
    ],
)
def test_invalid_options_are_refused(trained, tmp_path, capsys, option, message):
    given = [f"input={write_text(tmp_path)}", f"output={tmp_path / 'found.csv'}", option.format(top=tmp_path)]
    assert run_predict(trained, *given) == 2
    assert message.format(top=tmp_path) in error_line(capsys)
    assert not (tmp_path / "found.csv").exists()


def embedded(trained: Path, output: Path, *options: str) -> dict[str, np.ndarray]:
    common = (f"load_path={trained}", "precision=32", "num_workers=0", f"output={output}")
    assert call("embed", *common, *options) == 0
    if output.suffix == ".npz":
        with np.load(output) as file:
            return dict(file)
    with safe_open(output, "numpy") as file:
        return {"id": json.loads(file.metadata()["id"]), **load_file(output)}


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_features_of_a_split_are_the_inputs_of_the_head(workspace, trained, model, films, tmp_path, suffix):
    """They are complete, although the model was trained with missing modalities; the dataset defaults to the run's."""
    found = embedded(trained, tmp_path / f"found{suffix}", "split=test", "per_gpu_batchsize=4")
    for missing_type, empty in ((0, None), (1, "text"), (2, "image")):
        parts = [found[f"features/{name}"] * (name != empty) for name in ("image", "text")]
        logits = model._classifier.head(torch.from_numpy(np.concatenate(parts, axis=1)), torch.zeros(1))
        if missing_type == 0:
            assert torch.allclose(logits, films.logits[0], atol=1e-5)
            np.testing.assert_array_equal(found["fused"], np.concatenate(parts, axis=1))
    data = ArrowDataset(FILMS, workspace.arrow, "test")
    assert list(found["id"]) == [data.sample_name(number) for number in range(len(data))]
    np.testing.assert_array_equal(found["label"], data.label_of_sample)
    assert found["present/image"].all() and found["present/text"].all()


def test_features_of_missing_modalities_are_zero_and_marked(trained, model, films, tmp_path):
    table = write_table(tmp_path / "in", films, ".csv")
    found = embedded(trained, tmp_path / "found.npz", f"input={table}", "per_gpu_batchsize=4")
    assert found["id"].tolist() == [f"film {n}" for n in range(len(films.texts))] and "label" not in found
    for column, name in enumerate(("image", "text")):
        present, width = found[f"present/{name}"], found[f"features/{name}"].shape[1]
        assert present.tolist() == [number % 3 != 2 - column for number in range(len(films.texts))]
        assert [row.any() for row in found[f"features/{name}"]] == present.tolist()
        np.testing.assert_array_equal(
            found["fused"][:, column * width : (column + 1) * width], found[f"features/{name}"]
        )
    again = model.embed(texts=films.texts[2:6:3])
    np.testing.assert_allclose(again["features/text"], found["features/text"][2:6:3], rtol=0, atol=1e-5)
    assert not again["present/image"].any() and not again["features/image"].any()


def test_the_validation_split_may_be_called_dev(workspace: Workspace, trained: Path, tmp_path: Path) -> None:
    data = ArrowDataset(FILMS, workspace.arrow, "val")
    found = embedded(trained, tmp_path / "found.npz", "split=dev")
    assert list(found["id"]) == [data.sample_name(number) for number in range(len(data))]


def test_features_of_a_split_follow_a_given_missing_pattern(trained: Path, tmp_path: Path) -> None:
    options = ("split=train", "missing_ratio.train=1", "missing_type=text", f"missing_table_root={tmp_path}")
    found = embedded(trained, tmp_path / "found.npz", *options)
    assert len(found["id"]) == 45 and found["present/image"].all() and not found["present/text"].any()


def test_no_training_sample_is_its_own_neighbour_whatever_is_missing(workspace: Workspace, tmp_path: Path) -> None:
    """A sample does not find its own text, hidden now but seen in training; with other data it may find any row."""
    options = ("prompt_type=none", "neighbours=1", "missing_ratio=0", "max_epoch=1", "test_after_fit=False")
    command = workspace.command(f"vit={workspace.backbone}", f"log_dir={tmp_path}", "exp_name=near", *options)
    assert command_line(command) == 0
    best = tmp_path / "near_seed0" / "version_0" / "best.ckpt"
    content = torch.load(best, weights_only=True)
    content["state_dict"]["neighbours.feature_gate_M"] = torch.ones(2)
    torch.save(content, best)
    content["rep"]["contents"]["data of train"] = "0" * 64
    torch.save(content, other := best.with_name("other.ckpt"))
    whole = embedded(best, tmp_path / "whole.npz", "split=train")["features/text"]
    hidden = ("split=train", "missing_ratio.train=1", "missing_type=text", f"missing_table_root={tmp_path}")
    given = (f"data_root={workspace.arrow}", *hidden)
    found = []
    for checkpoint in (best, other):
        fused = embedded(checkpoint, tmp_path / "hidden.npz", *given)["fused"]
        found.append(int(np.isclose(fused[:, -whole.shape[1] :], whole, atol=2e-3).all(axis=1).sum()))
    assert found == [0, 40]  # of 45 texts; if a film has several, its first is as near as the others


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("input=None", "embed: expected a checkpoint and samples"),
        ("split=test", "input=samples.csv or split=test; found load_path, input, split"),
        ("split=all", "split: expected train or val or test, found 'all'"),
        ("output=found.csv", "output: expected a .npz or .safetensors file, found 'found.csv'"),
        ("output=/proc/found.npz", "output=/proc/found.npz: cannot be written: nothing can be created there"),
    ],
)
def test_invalid_options_of_embed_are_refused(trained, tmp_path, capsys, monkeypatch, option, message):
    monkeypatch.chdir(tmp_path)
    given = (f"load_path={trained}", f"input={write_text(tmp_path)}", "precision=32", "num_workers=0", option)
    assert call("embed", *given) == 2
    assert message in error_line(capsys)


def test_items_have_the_id_and_place_of_their_row(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text('image,text\na.jpg,"two\nlines"\nb.jpg,\n')
    assert read_items(tmp_path / "in.csv", FILMS) == [
        Item("2", {"image": tmp_path / "a.jpg", "text": "two\nlines"}, f"{tmp_path / 'in.csv'}, row 2"),
        Item("4", {"image": tmp_path / "b.jpg"}, f"{tmp_path / 'in.csv'}, row 4"),
    ]
    for name in ("a.jpg", "a.jpeg", "a.txt"):
        (tmp_path / name).write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"a.jpg: expected one file of this name, found a.jpeg too"):
        read_items(tmp_path, FILMS)
    (tmp_path / "a.jpg").unlink()
    with pytest.raises(DataError, match=r"a.txt: not readable as UTF-8 text"):
        read_items(tmp_path, FILMS)


def test_files_are_found_under_equivalent_names(tmp_path: Path) -> None:
    """Names may differ in Unicode form, case or separators, as on other systems; hidden files are ignored."""
    spec = DATASETS["mmimdb"]
    (tmp_path / "in").mkdir()
    grey = Image.fromarray(np.array([[0, 65535]] * 2, dtype=np.uint16))
    for name in ("caf\u00e9.TIF", "b.tif", "._b.tif", ".hidden/c.png"):
        (tmp_path / "in" / name).parent.mkdir(exist_ok=True)
        grey.save(tmp_path / "in" / name, "TIFF")
    (tmp_path / "in" / "cafe\u0301.txt").write_text("a caf\u00e9")
    (tmp_path / "in" / "b.txt").write_text(" \n")
    items = read_items(tmp_path / "in", spec)
    assert [(item.id, sorted(item.inputs)) for item in items] == [("b", ["image"]), ("caf\u00e9", ["image", "text"])]
    read = ImageKind.read_given(items[0].inputs["image"], spec.modalities["image"], InputFormat(2))
    assert read.shape == (3, 2, 2) and read[0, 0].tolist() == [0, 255]
    table = tmp_path / "table.csv"
    table.write_text("\ufeffID, Image,t\u0435xt\n1,in\\B.TIF,one\n2,in/cafe\u0301.tif,\n", "utf-8")
    found = [(item.id, item.inputs) for item in read_items(table, spec)]
    assert found == [
        ("1", {"image": tmp_path / "in" / "b.tif", "text": "one"}),
        ("2", {"image": tmp_path / "in" / "caf\u00e9.TIF"}),
    ]


def test_an_exported_model_gives_the_results_of_its_checkpoint(workspace, trained, films, tmp_path):
    out = tmp_path / "shared"
    assert call("export", f"load_path={trained}", f"out={out}") == 0
    card, at = (out / "README.md").read_text(), read_checkpoint(out).training
    assert at is not None and (at.missing_type, at.ratio, at.both_ratio, at.seed) == ("both", 0.7, 0.5, 0)
    assert at.commit == commit() and f"commit {at.commit}" in card
    assert all(fact in card for fact in ("fitted", "MM-IMDb", "rep", "70 % both", "Seed: 0", "Horror"))
    tested = read_json(trained.with_name("test_results.json"))
    assert f"trained parameters ({tested['trained_parameters']:,}) and" in card
    named = read_json(out / "config.json")["rep"]["backbone"]["name"]
    assert named == str(workspace.backbone.relative_to(workspace.root.parent)), "found from a folder above the export"
    texts = films.texts[:3]
    moved = Path(shutil.copytree(out, tmp_path / "moved"))
    (moved / "config.json").write_text((out / "config.json").read_text().replace(named, "not/here"))
    with pytest.raises(BackboneError, match=r"vit=not/here: expected one of .* found nothing by that name"):
        load_model(moved)
    assert load_model(moved, vit=str(workspace.backbone)).predict(texts=texts) == load_model(out).predict(texts=texts)
    assert load_model(out).threshold == load_model(trained).threshold != 0.5
    assert load_model(out).predict(texts=texts) == load_model(trained).predict(texts=texts)
    options = ("bootstrap=0", "robustness_seeds=[0]")
    assert command_line(workspace.command(f"load_path={out}", *options, name="robustness")) == 0
    results = [read_json(place / "robustness" / "robustness.json")["cells"] for place in (trained.parent, out)]
    assert results[0] == results[1]


@pytest.mark.parametrize(
    ("name", "out", "shared"),
    [
        ("ViT-B/16", "/data/runs/export", "ViT-B/16"),
        ("/data/clip/tiny", "/data/runs/export", "clip/tiny"),
        ("/data/clip/tiny", "/data/clip/tiny/export", "tiny"),
        ("/elsewhere/clip/tiny", "/data/runs/export", "tiny"),
        ("{home}/clip/tiny", "{home}/runs/export", "clip/tiny"),
        ("{home}/clip/tiny", "{users}/other/export", "tiny"),
    ],
)
def test_an_export_names_no_folder_of_its_user(name: str, out: str, shared: str, monkeypatch: Patch) -> None:
    monkeypatch.setenv("HOME", "/users/me")
    places = {"home": "/users/me", "users": "/users"}
    assert shared_name(name.format(**places), Path(out.format(**places))) == shared


def test_the_hub_can_read_the_card_of_an_export(trained: Path, tmp_path: Path) -> None:
    """The export folder is next to the checkpoint by default."""
    hub = pytest.importorskip("huggingface_hub")
    shutil.copytree(trained.parent, tmp_path / "run")
    assert call("export", f"load_path={tmp_path / 'run' / 'best.ckpt'}") == 0
    data = hub.ModelCard.load(tmp_path / "run" / "export" / "README.md").data
    assert (data.library_name, data.license, "rep" in data.tags) == ("rep", "other", True)


def test_the_card_has_results_of_its_own_checkpoint_only(trained: Path, tmp_path: Path) -> None:
    """A run tests best.ckpt, so the card of last.ckpt has no results."""
    for name, tested in (("best", True), ("last", False)):
        export(trained.with_name(f"{name}.ckpt"), tmp_path / name)
        card = (tmp_path / name / "README.md").read_text()
        assert ("f1_macro" in card) == tested and ("Not tested." in card) != tested


def test_invalid_exports_are_refused(trained: Path, tmp_path: Path, capsys: Captured) -> None:
    def refused(*options: str) -> str:
        assert call("export", *options) == 2
        return capsys.readouterr().err

    assert str(tmp_path) in refused(f"load_path={trained}", f"out={tmp_path}")
    assert "load_path" in refused(f"out={tmp_path / 'x'}") and not (tmp_path / "x").exists()
    assert "error: /proc/x: nothing can be created there" in refused(f"load_path={trained}", "out=/proc/x")
    export(trained, tmp_path / "whole")
    (tmp_path / "whole" / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(CheckpointError, match="model_type rep"):
        read_checkpoint(tmp_path / "whole")
    export(trained, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not readable"):
        read_checkpoint(tmp_path / "cut")
