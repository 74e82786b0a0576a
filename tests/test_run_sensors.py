"""A sensor dataset through run.py: FOCAL pretraining, fine-tuning, supervised training, and the commands after them."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from clip.modules.method import MethodOptions
from common.errors import CheckpointError, DataError
from engine.checkpoint import ModelSpec, backbone_in, build_classifier
from engine.families import BackboneChoice, family_of
from engine.items import Item
from engine.neighbour_accuracy import neighbour_accuracy
from engine.predict import load_model
from engine.training import FinetuneModule
from make_arrow import main as make_arrow
from run import command_line
from sensors.augmentations import VIEWS, draw_view
from sensors.backbone import build
from sensors.swt import SwtTower
from sensors.weights import published_weights, sizes_for
from tests.conftest import Captured, Patch, call, read_csv, read_json
from tests.interrupted import assert_same_end
from tests.models import batch_of
from tests.report_files import page_text
from tests.sensor_files import ROWS, write_set
from tests.test_resume import interrupt
from tests.test_sensor_rep import ALL, make, signals_of
from vilt.datasets.arrow_dataset import ArrowDataset
from vilt.datasets.kinds import ArrayKind
from vilt.datasets.open_spec import open_spec

NETWORK = ("network.width=8", "network.blocks=[1,1]", "network.feature_width=12", "network.projection_width=6")
FOCAL = ("prompt_type=focal", "missing_ratio=0")
FOREST_NAMES = ("one", "one for each pattern")
SMALL = ("batch_size=16", "per_gpu_batchsize=16", "max_epoch=2", "precision=32", "num_workers=0")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sensors")
    raw = write_set(folder / "raw")
    assert make_arrow(["--dataset", "sensors", "--root", str(raw), "--target", str(folder / "data")]) == 0
    return folder


def command(root: Path, config: str, *options: str) -> list[str]:
    places = (f"data_root={root / 'data'}", f"log_dir={root / 'result'}", f"missing_table_root={root / 'tables'}")
    return ["run.py", "with", config, *places, *SMALL, *options]


@pytest.fixture(scope="module")
def pretrained(root: Path) -> Path:
    assert command_line(command(root, "task_pretrain_sensors", "exp_name=pre", *NETWORK)) == 0
    return root / "result" / "pre_seed0" / "version_0"


@pytest.fixture(scope="module")
def trained(root: Path, pretrained: Path) -> Path:
    load = (f"load_path={pretrained / 'best.ckpt'}", "missing_type=some", "memory_depth=2", "memory_length=6")
    assert command_line(command(root, "task_finetune_sensors", "exp_name=rep", *load)) == 0
    return root / "result" / "rep_seed0" / "version_0"


def state_of(path: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = torch.load(path, weights_only=True)["state_dict"]
    return found


def test_pretraining_trains_only_towers_and_projections(root: Path, pretrained: Path) -> None:
    state = state_of(pretrained / "best.ckpt")
    parts = {name.split(".")[1] for name in state}
    assert parts == {"freq_interval_layers", "mod_in_layers", "mod_projectors", "weight", "bias"}
    rows = read_csv(pretrained / "metrics.csv")
    for name in ("train/shared", "train/private", "train/orthogonal", "train/temporal", "val/loss"):
        values = [float(row[name]) for row in rows if row[name]]
        assert values and all(value > 0 for value in values), name
    losses = [float(row["val/loss"]) for row in rows if row["val/loss"]]
    assert losses[-1] < losses[0]
    [accuracy] = [float(row["val/neighbour_accuracy"]) for row in rows if row["val/neighbour_accuracy"]]
    backbone = backbone_in(pretrained / "last.ckpt")  # neighbour accuracy is measured after the last epoch
    assert backbone is not None
    model = build(backbone.architecture).eval()
    model.load_state_dict(backbone.state, strict=False)
    spec, features = open_spec("sensors", root / "data", ["train", "val"]), {}
    for split in ("train", "val"):
        dataset = ArrowDataset(spec, root / "data", split)
        signals = [dataset[0, row].inputs for row in range(len(dataset))]
        joined = [model.towers[name](torch.stack([one[name] for one in signals])) for name in model.places]
        features[split] = torch.cat(joined, dim=1).detach(), dataset.labels.tolist()
    right = 0
    for feature, label in zip(*features["val"], strict=True):
        nearest = (features["train"][0] - feature).norm(dim=1).argsort()[:5]
        right += label == round(float(np.mean([features["train"][1][row] for row in nearest])))
    assert accuracy == pytest.approx(right / len(features["val"][1]))
    described = torch.load(pretrained / "best.ckpt", weights_only=True)["rep"]
    assert described["backbone"]["name"] == "random:0"
    scale = described["architecture"]["input_scale"]
    assert set(scale) == {"acc", "gyr", "lig"} and all(value > 0 for value in scale.values())


def test_only_labelled_neighbours_count_and_ties_go_to_the_lowest_class() -> None:
    known = torch.tensor([[0.0], [1], [2], [10], [11], [12], [3]]), torch.tensor([0, 0, 1, 2, 2, 2, -1])
    for label, share in ((0, 1.0), (2, 0.5)):
        assert neighbour_accuracy(known, (torch.tensor([[0.0], [11]]), torch.tensor([label, 2]))) == share


def test_fine_tuning_loads_the_pretrained_towers_and_freezes_them(root: Path, pretrained: Path, trained: Path) -> None:
    saved = state_of(trained / "best.ckpt")
    assert {name.split(".")[1] for name in saved} == {"memory_learner", "mod_fusion_layers", "weight", "bias"}
    predictor = load_model(trained / "best.ckpt", device="cpu")
    loaded = predictor._classifier.state_dict()
    for name, tensor in state_of(pretrained / "best.ckpt").items():
        if name.startswith(("model.freq", "model.mod_in")):
            assert torch.equal(loaded[name], tensor), name
    results = read_json(trained / "test_results.json")
    assert results["samples"] == 12 and sum(results["missing"].values()) == 12
    lost = {name for name, count in results["missing"].items() if count}
    assert {"lig missing", "acc, gyr missing"} <= lost


def test_an_interrupted_pretraining_ends_with_the_same_bits(root, pretrained, monkeypatch, capsys):
    again = command(root, "task_pretrain_sensors", "exp_name=pre_again", *NETWORK, "resume_from=auto")
    interrupt(again, monkeypatch, checkpoints=2)
    assert command_line(again) == 0
    assert "only 8 optimiser steps in all" in capsys.readouterr().err  # 48 samples in 16 subsequences of 4, filled
    assert_same_end(pretrained, root / "result" / "pre_again_seed0" / "version_1")


def test_robustness_runs_and_report_accept_sensors(root: Path, trained: Path, tmp_path: Path, capsys: Captured) -> None:
    options = ("robustness_ratios=[0,0.7]", "robustness_seeds=[0]", "bootstrap=0", "num_workers=0", "precision=32")
    assert call("robustness", f"load_path={trained / 'best.ckpt'}", *options) == 0
    found = read_json(trained / "robustness" / "robustness.json")
    assert len(found["by_type"]) == 7
    assert {cell["missing_type"] for cell in found["cells"]} == {"lig", "gyr", "acc", "any", "some"}
    assert call("runs", f"log_dir={root / 'result'}") == 0
    said = capsys.readouterr().out
    assert "made_up" in said and re.search(r"focal +0 % any +– +– .*pretraining\n", said), "no accuracy"
    assert re.search("all . runs: .*state finished", said)
    assert call("report", f"runs={root / 'result'}", f"out={tmp_path / 'report'}") == 0
    page = page_text(tmp_path / "report")
    assert "without acc + gyr" in page and "1 of 1 trained run with" in page and "no robustness results" not in page


def test_a_split_is_embedded_with_missing_types_of_the_checkpoint(root: Path, trained: Path, tmp_path: Path) -> None:
    options = (f"load_path={trained / 'best.ckpt'}", f"data_root={root / 'data'}", f"output={tmp_path / 'out.npz'}")
    given = ("split=val", "missing_ratio=1", "missing_type=gyr+acc", f"missing_table_root={tmp_path}", "num_workers=0")
    assert call("embed", *options, *given) == 0
    with np.load(tmp_path / "out.npz") as features:
        present = {name: features[f"present/{name}"].tolist() for name in ("acc", "gyr", "lig")}
    assert present == {"acc": [False] * 12, "gyr": [False] * 12, "lig": [True] * 12}


@pytest.mark.parametrize("network", ["swt", "deepsense"])
def test_supervised_training_of_both_networks(root: Path, network: str) -> None:
    own = NETWORK if network == "swt" else ("network.width=8", "network.recurrent_width=4")
    sizes = (*own, f"network.type={network}", "missing_type=acc", "max_epoch=1")
    assert command_line(command(root, "task_finetune_sensors", "supervised", f"exp_name={network}", *sizes)) == 0
    state = state_of(root / "result" / f"{network}_seed0" / "version_0" / "best.ckpt")
    statistics = [name for name in state if name.endswith("running_var")]
    assert bool(statistics) == (network == "deepsense")
    assert any("patch_embed" in name or "loc_mod_extractors" in name for name in state)


def test_all_processes_validate_with_the_saved_running_statistics(root: Path, monkeypatch: Patch) -> None:
    """The first process's statistics are broadcast; otherwise each process would use its own."""
    row = open_spec("sensors", root / "data", ["train"])
    sizes = sizes_for(row, {"type": "deepsense", "width": 8, "recurrent_width": 4}, {})
    spec = ModelSpec("sensors", MethodOptions("full"), sizes, custom=row.custom)
    module = FinetuneModule(build_classifier(spec), spec)
    monkeypatch.setattr(FinetuneModule, "trainer", SimpleNamespace(world_size=2))
    monkeypatch.setattr(FinetuneModule, "_check_finite", lambda _: None)
    monkeypatch.setattr(torch.distributed, "broadcast", lambda tensor, src: tensor.fill_(7 + src))
    before = {name: value.clone() for name, value in module.classifier.state_dict().items()}
    module.on_validation_start()
    changed = {name for name, value in module.classifier.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if "running" in name} and len(changed) == 2 * 3 * 3


def test_a_warm_start_from_another_family_is_refused(root: Path, monkeypatch: Patch, capsys: Captured) -> None:
    image_checkpoint = SimpleNamespace(path="best.ckpt", spec=SimpleNamespace(task="mmimdb"))
    monkeypatch.setattr("runs.training.read_checkpoint", lambda _: image_checkpoint)
    assert command_line(command(root, "task_finetune_sensors", f"load_path={__file__}")) == 2
    assert "load_path=best.ckpt: expected a model for sensors, found one of mmimdb" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("network.width=none",), "network: width: expected int, found 'none'"),
        (("network.depth=3",), "network: expected "),
        (("network.input_scale={'acc':2.0}",), "network: expected "),
        (("network.type=resnet",), "network.type: expected swt or deepsense, found 'resnet'"),
        (("network.patch={'acc':[1,2],'gyro':[1,2]}",), "network.patch: expected acc or gyr or lig, found 'gyro'"),
        (("network.window=[3]",), "network: window: expected two sizes, found [3]"),
        (("network.blocks=[]",), "network: blocks: expected integers of at least 1, found []"),
        (("network.kernel=5",), "network.kernel: is a size of network.type=deepsense, found network.type=swt"),
        (("network.type=deepsense", "network.heads=2"), "network.heads: is a size of network.type=swt, found"),
        (("network.type=deepsense", "network.kernel=0"), "network: kernel: expected integers of at least 1, found 0"),
        (
            ("network.type=deepsense", "network.inner_layers=-1"),
            "inner_layers and temperature: expected at least 0 and above 0, found -1 and",
        ),
        (("network.projection_width=5",), "expected an even number (shared and private half), found 5"),
        (("network.heads=3",), "network: width and feature_width: expected multiples of heads=3, found 32 and 128"),
        (("train_ends=True",), "train_ends: is not an option of task=sensors, found True"),
        (("vit_activation=gelu",), "vit_activation: is not an option of task=sensors, found gelu"),
        (("missing_type=image",), "any or some, or several as acc+gyr, found 'image'"),
        (("missing_type=both",), "any or some, or several as acc+gyr, found 'both'; did you mean any?"),
        (("prompt_type=coop",), "prompt_type: expected rep or none or full or focal with task=sensors, found coop"),
        (("network.type=deepsense", "prompt_type=rep"), "expected network.type=swt"),
        (("memory_depth=7",), "memory_depth=7 needs more blocks than the backbone has"),
        (("vit=ViT-B/16",), "vit: expected random, or a file with a pretrained backbone, found 'ViT-B/16'"),
        (("prompt_type=focal",), "missing_ratio: expected 0 with prompt_type=focal, found 0.7"),
        ((*FOCAL, "simulate_missing=True"), "simulate_missing: expected False with prompt_type=focal"),
        ((*FOCAL, "modality_dropout=0.3"), "modality_dropout: expected 0 with prompt_type=focal, which compares all"),
        (
            (*FOCAL, "label_ratio=0.1"),
            "label_ratio: expected 1 with prompt_type=focal, which uses no labels",
        ),
        ((*FOCAL, "teacher=best.ckpt"), "teacher: expected None with prompt_type=focal, which uses no labels"),
        ((*FOCAL, "lr_mult=2"), "lr_mult: expected 1 with prompt_type=focal, which trains no head, found 2"),
        ((*FOCAL, "per_gpu_batchsize=6"), "per_gpu_batchsize: expected a multiple of 4"),
        ((*FOCAL, "per_gpu_batchsize=4"), "for at least 2 subsequences, with prompt_type=focal, found 4"),
    ],
)
def test_invalid_options_are_refused(root: Path, capsys: Captured, options: tuple[str, ...], message: str) -> None:
    assert command_line(command(root, "task_finetune_sensors", "exp_name=wrong", *options)) == 2
    assert message in capsys.readouterr().err
    assert not (root / "result" / "wrong_seed0").exists()


def test_models_of_other_modalities_or_sizes_are_refused(root, pretrained, trained, tmp_path, capsys):
    raw = write_set(tmp_path / "raw", modalities=("acc", "gyr"))
    assert make_arrow(["--dataset", "sensors", "--root", str(raw), "--target", str(tmp_path / "data")]) == 0
    backbone, other = f"load_path={pretrained / 'best.ckpt'}", f"data_root={tmp_path / 'data'}"
    found = "vit: expected a backbone of acc (2, 4, 4), gyr (2, 4, 4), found one of acc (2, 4, 4), gyr (2, 4, 4), lig ("
    for options, message in (
        ((backbone, other), found),
        ((backbone, other, "prompt_type=full"), found),
        ((f"load_path={trained / 'best.ckpt'}", other, "test_only=True"), "expected the modalities [('acc', 2, 4, 4,"),
        ((backbone, "network.width=16"), f"network.width: expected 8, as in {pretrained / 'best.ckpt'}, found 16"),
        ((backbone, "network.patch={'acc':[1,2]}"), "network.patch: expected {'acc': [1, 1], "),
        ((backbone, "prompt_type=full", "network.width=16"), "network.width: expected 8, as in the checkpoint"),
    ):
        assert command_line([*command(root, "task_finetune_sensors", "exp_name=refused"), *options]) == 2
        assert message in capsys.readouterr().err
    assert not (root / "result" / "refused_seed0").exists()


def test_published_weights_load_as_a_backbone(root: Path, tmp_path: Path) -> None:
    """Every name is accounted for; fusion, head and projections are left out."""
    spec = open_spec("sensors", root / "data", ["train"])
    sizes = sizes_for(spec, {"width": 8, "blocks": [1, 1], "feature_width": 12}, {})
    backbone = make(sizes).model
    state = {name: x for name, x in backbone.state_dict().items() if not name.startswith("memory_learner.")}
    added = {"class_layer.0.weight": torch.zeros(2, 12), "mod_projectors.acc.0.weight": torch.zeros(6, 12)}
    torch.save({**state, **added}, path := tmp_path / "focal.pt")
    found = published_weights(path, sizes)
    assert set(found.state) == {name for name in state if not name.startswith("mod_fusion_layers.")}
    del state["mod_in_layers.sensors.acc.weight"]
    torch.save(state, path)
    with pytest.raises(Exception, match=r"1 names missing \(mod_in_layers\.sensors\.acc\.weight\)"):
        published_weights(path, sizes)


def test_a_pretrained_backbone_cannot_be_evaluated(root: Path, pretrained: Path, capsys: Captured) -> None:
    """Its head is untrained."""
    load = f"load_path={pretrained / 'best.ckpt'}"
    for words in ([*command(root, "task_finetune_sensors"), "test_only=True"], ["run.py", "robustness", "with"]):
        assert command_line([*words, load]) == 2
        assert "a pretrained backbone (prompt_type=focal)" in capsys.readouterr().err
    for option in ("sweep_ratios=0.7", "search.learning_rate=[1e-4,1e-2]"):
        words = [*command(root, "task_pretrain_sensors"), "sweep_name=pre", option]
        assert command_line(["run.py", "sweep", *words[1:]]) == 2
        assert "prompt_type: expected methods that can be tested, found focal" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="a pretrained backbone"):
        load_model(pretrained / "best.ckpt")


def test_an_exported_backbone_can_be_loaded(pretrained: Path, tmp_path: Path) -> None:
    assert call("export", f"load_path={pretrained / 'best.ckpt'}", f"out={tmp_path / 'out'}") == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "pretrained without labels on made_up" in card and "classified" not in card and "load_model" not in card
    ours = backbone_in(pretrained / "best.ckpt")
    assert ours is not None
    exported = family_of("sensors").load(BackboneChoice(str(tmp_path / "out")), ours.architecture)
    assert exported.sha256 == ours.sha256 and exported.architecture == ours.architecture


def test_views_change_each_modality_some_of_the_time() -> None:
    torch.manual_seed(0)
    signals = signals_of(make().model.sizes, 3)  # type: ignore[arg-type]
    changed = dict.fromkeys(signals, 0)
    for _ in range(40):
        view = draw_view(signals)
        for name, x in signals.items():
            assert view[name].shape == x.shape and torch.isfinite(view[name].abs()).all()
            changed[name] += not torch.equal(view[name].real, x)
    assert all(8 <= count <= 32 for count in changed.values())


def test_plain_views_permute_intervals_negate_reverse_and_scale() -> None:
    torch.manual_seed(0)
    x = 1 + torch.rand(2, 3, 5, 4)
    permuted, negated, turned, scaled = (view(x) for view in VIEWS[:4])
    order = [int((permuted[:, :, [k]] == x).all(dim=(0, 1, 3)).nonzero()) for k in range(5)]
    assert sorted(order) == [0, 1, 2, 3, 4] != order
    assert torch.equal(negated, -x) and torch.equal(turned.flatten(2), x.flatten(2).flip(2))
    factor = scaled[0, 0, 0, 0] / x[0, 0, 0, 0]
    torch.testing.assert_close(scaled, factor * x)
    assert 0 < abs(factor - 1) < 1


def test_mixed_samples_have_mixed_labels() -> None:
    """Sample k has the value and the class k, so the mean value follows from the class shares; a phase keeps both."""
    from sensors.methods import Supervised

    torch.manual_seed(1)
    classifier = make(kind=Supervised)
    values, signals = torch.arange(7.0), signals_of(classifier.model.sizes, 7)  # type: ignore[arg-type]
    batch = batch_of({name: values[:, None, None, None].expand_as(x) for name, x in signals.items()}, ALL)
    partners = torch.zeros(7, 7, dtype=torch.bool)
    for _ in range(100):
        mixed, shares = classifier.method.augment(batch, torch.arange(7), 7)
        mean = torch.zeros(7)
        for name, x in mixed.inputs.items():
            assert x.shape == batch.inputs[name].shape
            mean[batch.rows[name]] += x.abs().mean(dim=(1, 2, 3))
        torch.testing.assert_close(shares @ values, mean / ALL.sum(dim=1))
        torch.testing.assert_close(shares.sum(dim=1), torch.ones(7))
        partners |= shares > 0
    assert torch.equal(partners, ALL.float() @ ALL.float().T > 0), "those with a modality in common"
    logits, _ = classifier.training_outputs(mixed, shares)
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("seed", range(4))
def test_a_batch_in_which_all_samples_lack_a_modality_can_be_mixed(seed: int) -> None:
    from sensors.methods import Supervised

    classifier = make(kind=Supervised)
    name, *others = classifier.model.places
    signals = signals_of(classifier.model.sizes, 5)  # type: ignore[arg-type]
    batch = batch_of(signals, torch.tensor([[False, True, True]] * 5))
    batch = batch._replace(inputs={**batch.inputs, name: ArrayKind.collate([]).input_b})
    torch.manual_seed(seed)
    mixed, shares = classifier.method.augment(batch, torch.arange(5) % 4, 4)
    assert torch.allclose(shares.sum(dim=1), torch.ones(5))
    assert all(mixed.inputs[other].shape == signals[other].shape for other in others)
    assert torch.isfinite(classifier.training_outputs(mixed, shares)[0]).all()


def test_recordings_are_predicted_sample_by_sample(root: Path, trained: Path, tmp_path: Path) -> None:
    dataset = ArrowDataset(open_spec("sensors", root / "data", ["test"]), root / "data", "test")
    signals = np.load(root / "raw" / "signals.npy")[11 * ROWS :] * np.float32(0.01)
    recording = {"acc": signals[:, :2], "gyr": signals[: ROWS - 3, 2:4], "lig": None}
    model = load_model(trained / "best.ckpt", device="cpu")
    found = model.predict_recording(recording)
    assert [(start, end) for start, end, _ in found] == [(float(n), n + 1.0) for n in range(5)]
    for number, (_, _, one) in enumerate(found):
        inputs = {name: dataset[0, 6 + number].inputs[name].numpy() for name in ("acc", "gyr")}
        [expected] = model.predict_items([Item("", inputs, "")], batch_size=1)
        assert one.missing == "lig missing" and one.labels == expected.labels
        assert list(one.probabilities.values()) == pytest.approx(list(expected.probabilities.values()), abs=1e-5)
    for name in ("acc", "gyr"):
        np.save(tmp_path / f"{name}.npy", recording[name])
    (tmp_path / "in.csv").write_text("id,acc,gyr\nwalk,acc.npy,gyr.npy\nrun,acc.npy,\n")
    output = tmp_path / "out.csv"
    options = [f"load_path={trained / 'best.ckpt'}", f"input={tmp_path / 'in.csv'}", f"output={output}"]
    assert call("predict", "precision=32", "num_workers=0", *options) == 0
    rows = read_csv(output)
    assert [(row["id"], row["start_s"]) for row in rows[4:7]] == [("walk", "4.0"), ("run", "0.0"), ("run", "1.0")]
    assert len(rows) == 11 and rows[5]["missing"] == "gyr, lig missing"
    options[2] = f"output={tmp_path / 'out.npz'}"
    assert call("embed", "precision=32", "num_workers=0", *options) == 0
    with np.load(tmp_path / "out.npz") as features:
        assert features["start_s"].tolist() == [float(row["start_s"]) for row in rows]
        logits = model._classifier.head(torch.from_numpy(features["fused"]), torch.zeros(11))
        probabilities = [[float(value) for name, value in row.items() if name.startswith("p(")] for row in rows]
        torch.testing.assert_close(logits.softmax(1), torch.tensor(probabilities), rtol=0, atol=1e-5)
        assert features["present/gyr"].tolist() == [row["missing"] == "lig missing" for row in rows]
        assert not features["features/gyr"][5:].any() and not features["features/lig"].any()
    np.save(tmp_path / "gyr.npy", np.zeros((3, 2)))
    assert call("predict", "precision=32", "num_workers=0", *options) == 2
    with pytest.raises(DataError, match="expected signals of acc, gyr, lig, found sound"):
        model.predict_recording({"sound": np.zeros((20, 1))})
    with pytest.raises(DataError, match=r"the recording: expected signals \(values, channels\)"):
        model.predict_recording({"gyr": np.zeros((2, 4, 4))})
    with pytest.raises(DataError, match="sample 0: expected acc or gyr or lig, found text"):
        model.predict(texts=["walk"])
    np.savez(tmp_path / "gyr.npz", gyr=signals)
    (tmp_path / "gyr.txt").write_text("1 2\n" * ROWS)
    wrong: list[Any] = [tmp_path / "gyr.npz", tmp_path / "gyr.txt", np.zeros(ROWS), np.full((ROWS, 2), np.nan)]
    wrong += [[[0.0, 0.0]] * ROWS, np.full((ROWS, 2), 1j), np.full((ROWS, 2), "1"), np.full((ROWS, 2), 1e39)]
    for gyr in wrong:
        with pytest.raises(DataError, match=r"the recording.*: gyr") as refused:
            model.predict_recording({"acc": recording["acc"], "gyr": gyr})
        assert "pickle" not in str(refused.value) and len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize("method", ["none", "rep"])
def test_frozen_towers_stay_in_evaluation_mode_and_run_once_if_cached(root, pretrained, monkeypatch, method):
    modes: set[tuple[bool, ...]] = set()
    ran: list[int] = []
    step, encode = FinetuneModule.training_step, SwtTower.body

    def record_modes(module: FinetuneModule, *arguments: Any) -> Tensor:
        parts = map(module.classifier.model.get_submodule, ("freq_interval_layers", "mod_fusion_layers"))
        modes.add(tuple(part.training for part in parts))
        return step(module, *arguments)

    def count(tower: SwtTower, tokens: Tensor, *others: Any) -> Tensor:
        ran.append(len(tokens))
        return encode(tower, tokens, *others)

    monkeypatch.setattr(FinetuneModule, "training_step", record_modes)
    monkeypatch.setattr(SwtTower, "body", count)
    load = (f"load_path={pretrained / 'best.ckpt'}", f"prompt_type={method}", "memory_depth=2", "memory_length=6")
    states = {}
    for cached in (True, False) if method == "none" else (True,):  # REP's features are never constant
        if not cached:
            monkeypatch.setattr("runs.training.has_constant_features", lambda _: False)
        ran.clear()
        name = f"exp_name={method}_{cached}"
        assert command_line(command(root, "task_finetune_sensors", name, "max_epoch=3", *load)) == 0
        states[cached] = state_of(root / "result" / f"{method}_{cached}_seed0" / "version_0" / "last.ckpt")
        if method == "none" and cached:
            assert sum(ran) == 3 * 72  # three modalities of the samples in all splits
        else:
            assert sum(ran) > 3 * 72
    assert modes == {(False, True)}
    for name, tensor in states.get(False, {}).items():
        torch.testing.assert_close(tensor, states[True][name], rtol=1e-4, atol=1e-4)


def test_a_forest_is_measured_at_the_patterns_of_a_run(root: Path, tmp_path: Path) -> None:
    """Every modality reveals the class, so a forest is right on complete samples, and mostly right on others."""
    pytest.importorskip("sklearn")
    from benchmarks.forest import table

    split = {"train": "some", "test": "some"}
    config = {"task": "sensors", "data_root": str(root / "data"), "seed": 0, "both_ratio": 0.5}
    config |= {"missing_type": split, "missing_ratio": dict.fromkeys(split, 0.7)}
    (tmp_path / "config.json").write_text(json.dumps(config))
    cells = [{"missing_type": "some", "ratio": ratio, "both_ratio": None} for ratio in (0.0, 0.7)]
    (tmp_path / "robustness").mkdir()
    (tmp_path / "robustness" / "robustness.json").write_text(json.dumps({"cells": cells, "table_seeds": [0, 1]}))
    header, *alone = table([tmp_path])
    assert header.startswith("| forest | missing | ratio | accuracy")
    rows = [line.strip("| ").split(" | ") for line in alone]
    assert [row[:3] for row in rows] == [[name, "some", ratio] for name in FOREST_NAMES for ratio in ("0.0", "0.7")]
    assert all(row[3:] == ["100.0", "100.0"] for row in rows[::2]) and all(float(row[3]) > 80 for row in rows)
    [*_, last] = table([tmp_path] * 2)
    assert " ± 0.0 | " in last
