"""run.py on a dataset with three made-up modalities, a backbone family and a method, all defined in this file.

The program knows them only through their entries in DATASETS, FAMILIES and METHODS.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor, nn

from clip.backbone import FrozenWeights
from clip.modules.interfaces import Backbone, ModelInput, Place, Tower, TowerSlots
from clip.modules.method import Method, MethodOptions, select_by_missing_type
from clip.modules.registry import METHODS
from common.errors import DataError
from config import DEFAULTS
from engine.families import FAMILIES, BackboneChoice, Family
from run import command_line
from runs.check_options import check
from tests.conftest import Patch, call, read_csv, read_json
from tests.custom_files import read_arrow
from tests.data_files import write
from tests.interrupted import assert_same_end
from tests.report_files import page_text
from tests.test_resume import interrupt
from vilt.batches import collate
from vilt.datasets.arrow_dataset import ArrowDataset
from vilt.datasets.kinds import ArrayKind, InputFormat, kinds_of
from vilt.datasets.specs import DATASETS, SPLITS, DatasetSpec, Modality

SENSORS = DatasetSpec(
    name="gadgets",
    title="Sensors",
    modalities={
        "sound": Modality("array", "waves", (None, 4)),
        "motion": Modality("array", "motion", (6,)),
        "light": Modality("array", "light", (3, 2)),
    },
    id_column=None,
    n_classes=3,
    class_names=("walk", "run", "rest"),
    make_arrow_name="gadgets",
    converter="",
    family="gadgets",
    redrawn=True,
)
ROWS = {"train": 24, "val": 9, "test": 14}
TYPES = ("light", "motion", "sound", "any", "some")
TYPE_NAMES = (
    *("complete", "light missing", "motion missing", "motion, light missing"),
    *("sound missing", "sound, light missing", "sound, motion missing"),
)


@dataclass(frozen=True)
class SensorSizes:
    """The sizes of the backbone."""

    width: int
    embed_dim: int


class SensorTower(Tower):
    """Maps numbers to tokens, and the sum of slots and tokens to a feature."""

    def __init__(self, inputs: int, sizes: SensorSizes) -> None:
        super().__init__()
        self.into = nn.Linear(inputs, sizes.width)
        self.out = nn.Linear(sizes.width, sizes.embed_dim)

    def embed(self, input_b: Tensor) -> Tensor:
        return self.into(input_b if input_b.ndim == 3 else input_b[:, None])

    def body(self, tokens_bLD: Tensor, input_b: Tensor, slots: TowerSlots) -> Tensor:
        return self.out(torch.cat([*slots.inserted_BmD, tokens_bLD], dim=1).tanh().sum(dim=1))


class SensorBackbone(Backbone):
    """Three towers and a mixture of their features."""

    def __init__(self, sizes: SensorSizes) -> None:
        super().__init__()
        self.places = {name: Place(sizes.width, 1) for name in SENSORS.modalities}
        self.embed_dim = sizes.embed_dim
        self.of = nn.ModuleDict(
            {name: SensorTower(int(modality.shape[-1] or 0), sizes) for name, modality in SENSORS.modalities.items()}
        )
        self.mixture = nn.Linear(3 * sizes.embed_dim, 3 * sizes.embed_dim)

    @property
    def towers(self) -> dict[str, Tower]:
        return dict(self.of.items())  # type: ignore[arg-type]

    def embed(self, batch: ModelInput) -> dict[str, Tensor]:
        tokens = super().embed(batch)
        for name, tokens_bLD in tokens.items():  # zero the padding, which is in front
            L = tokens_bLD.shape[1]
            if batch.inputs[name].ndim == 3:
                padding_bL = torch.arange(L) < L - batch.length_b[name][:, None]
                tokens[name] = tokens_bLD.masked_fill(padding_bL[..., None], 0)
        return tokens

    def fuse(self, features: Mapping[str, Tensor], present_BM: Tensor) -> Tensor:
        return self.mixture(super().fuse(features, present_BM)).tanh()

    def parts(self) -> dict[str, list[nn.Parameter]]:
        return {"gadgets": [*self.of.parameters(), *self.mixture.parameters()]}

    def compute(self, dtype: torch.dtype, *, checkpointing: bool = False) -> None:
        pass


class SensorFamily(Family):
    """The family of that backbone, with weights drawn from a seed."""

    architecture = SensorSizes

    def build(self, architecture: SensorSizes) -> Backbone:
        return SensorBackbone(architecture)

    def load(self, choice: BackboneChoice, trained_on: Any = None) -> FrozenWeights:
        sizes = SensorSizes(8, 5)
        with torch.random.fork_rng():
            torch.manual_seed(5)
            return FrozenWeights(str(choice.vit), sizes, self.build(sizes).state_dict())

    def start_embeddings(self, weights: FrozenWeights, inputs: Any) -> dict[str, Tensor]:
        return {name: weights.state[f"of.{name}.into.bias"] for name in SENSORS.modalities}


class Sensing(Method):
    """A slot for each missing type, a buffer that follows the features, and a loss on them."""

    attribute = "sense"

    def __init__(self, places: Mapping[str, Place], embed_dim: int, options: MethodOptions) -> None:
        super().__init__(places, embed_dim, options)
        self.wobble = nn.ParameterDict({name: torch.zeros(7, 1, place.width) for name, place in places.items()})
        self.habit: Tensor
        self.register_buffer("habit", torch.zeros(embed_dim))

    def start_from(self, embeddings: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, slots in self.wobble.items():
                slots.copy_(embeddings[name] + 0.1 * torch.randn(slots.shape))

    def forward(self, batch: ModelInput, tokens: Mapping[str, Tensor]) -> dict[str, TowerSlots]:
        return {
            name: TowerSlots(inserted_BmD=[select_by_missing_type(list(slots), batch)])
            for name, slots in self.wobble.items()
        }

    def losses(
        self, slots: Mapping[str, TowerSlots], features: Mapping[str, Tensor], logits_BC: Tensor, labels: Tensor
    ) -> dict[str, Tensor]:
        mean_E = torch.stack([*features.values()]).mean(dim=(0, 1))
        self.habit.lerp_(mean_E.detach(), 0.1)
        return {"habit": (mean_E - self.habit).square().sum()}


def sensor_rows(split: str) -> pa.Table:
    draw, kind = np.random.default_rng(list(ROWS).index(split)), pa.list_(pa.list_(pa.float32()))
    labels = [row % 3 for row in range(ROWS[split])]
    waves = [draw.normal(label, 1, (draw.integers(1, 6), 4)).tolist() for label in labels]
    motion = pa.array([draw.normal(label, 1, 6).tolist() for label in labels], pa.list_(pa.float32(), 6))
    light = [draw.normal(-label, 1, (3, 2)).tolist() for label in labels]
    columns = {"waves": pa.array(waves, kind), "motion": motion, "light": pa.array(light, kind)}
    return pa.table({**columns, "label": labels})


@pytest.fixture(scope="module")
def registered() -> Iterator[None]:
    with Patch.context() as patch:
        patch.setitem(DATASETS, "gadgets", SENSORS)
        patch.setitem(FAMILIES, "gadgets", SensorFamily())
        patch.setitem(METHODS, "sensing", f"{__name__}:Sensing")
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("gadgets")
    for split in SPLITS:
        write(root / f"gadgets_{split}.arrow", sensor_rows(split))
    return root


def command(data: Path, *options: str, name: str | None = None) -> list[str]:
    places = (f"data_root={data}", f"log_dir={data / 'result'}", f"missing_table_root={data / 'tables'}")
    small = ("batch_size=8", "per_gpu_batchsize=4", "max_epoch=2", "precision=32", "num_workers=0")
    own = ("task=gadgets", "prompt_type=sensing", "vit=made up", "simulate_missing=True")
    return ["run.py", *([name] if name else []), "with", *own, *places, *small, *options]


@pytest.fixture(scope="module")
def trained(registered: None, data: Path) -> dict[str, Path]:
    """Folders of training runs, keyed by missing type."""
    for kind in ("any", "some"):
        assert command_line(command(data, f"exp_name={kind}", f"missing_type={kind}")) == 0
    return {kind: data / "result" / f"{kind}_seed0" / "version_0" for kind in ("any", "some")}


@pytest.fixture(scope="module")
def measured(trained: dict[str, Path], data: Path) -> Path:
    """Folder of the robustness results of one run."""
    options = ("robustness_ratios=[0,0.5,1]", "robustness_seeds=[0]", "bootstrap=20")
    assert command_line(command(data, f"load_path={trained['any'] / 'best.ckpt'}", *options, name="robustness")) == 0
    return trained["any"] / "robustness"


@pytest.mark.parametrize("kind", ["any", "some"])
def test_a_run_trains_tests_and_saves_the_state_of_the_method(trained: dict[str, Path], kind: str) -> None:
    results = read_json(trained[kind] / "test_results.json")
    lost = {name: count for name, count in results["missing"].items() if count}
    assert results["samples"] == 14 and results["missing_pattern"]["missing_type"] == kind
    assert lost.pop("complete") == 14 - int(0.7 * 14)
    assert set(lost) == {name for name in TYPE_NAMES[1:] if kind == "some" or "," not in name}
    assert max(lost.values()) - min(lost.values()) <= 1
    saved = torch.load(trained[kind] / "best.ckpt", weights_only=True)["state_dict"]
    own = {f"model.sense.{name}" for name in ("habit", *(f"wobble.{name}" for name in SENSORS.modalities))}
    assert set(saved) == own | {"gadgets_classifier.weight", "gadgets_classifier.bias"}
    assert saved["model.sense.habit"].any()
    losses = [float(row["train/habit"]) for row in read_csv(trained[kind] / "metrics.csv") if row["train/habit"]]
    assert losses and all(np.isfinite(losses))


def test_an_interrupted_training_ends_with_the_same_bits(trained, data, monkeypatch):
    again = command(data, "exp_name=again", "missing_type=some", "resume_from=auto")
    interrupt(again, monkeypatch, checkpoints=4)
    assert command_line(again) == 0
    assert_same_end(trained["some"], data / "result" / "again_seed0" / "version_1")


def test_logits_are_stored_for_each_of_seven_missing_types(measured: Path) -> None:
    table = read_arrow(measured / "logits.arrow")
    columns = [name for name in table.column_names if name.startswith("logits_")]
    assert columns == [f"logits_{name.replace(', ', '_').replace(' ', '_')}" for name in TYPE_NAMES]
    assert len({tuple(map(tuple, table[name].to_pylist())) for name in columns}) == 7
    assert list(read_json(measured / "robustness.json")["by_type"]) == list(TYPE_NAMES)


@pytest.mark.parametrize("kind", ["motion", "some"])
def test_each_cell_equals_an_evaluation(measured: Path, data: Path, kind: str) -> None:
    cells = read_json(measured / "robustness.json")["cells"]
    assert {cell["missing_type"] for cell in cells} == set(TYPES) and len(cells) == 15
    for ratio in (0.5, 1.0):
        name = f"{kind}_{ratio}"
        pattern = (f"test_type={kind}", f"test_ratio={ratio}", f"test_exp_name={name}")
        evaluation = (f"load_path={measured.parent / 'best.ckpt'}", "test_only=True", *pattern)
        assert command_line(command(data, *evaluation)) == 0
        results = read_json(data / "result" / name / "version_0" / "test_results.json")
        (cell,) = (cell for cell in cells if (cell["missing_type"], cell["ratio"]) == (kind, ratio))
        assert {metric: figures["mean"] for metric, figures in cell["metrics"].items()} == pytest.approx(
            {metric: results["metrics"][metric] for metric in cell["metrics"]}
        )
        for modality in SENSORS.modalities:
            lacking = sum(n for type_name, n in results["missing"].items() if modality in type_name)
            assert cell[f"{modality}_available"] == pytest.approx(1 - lacking / 14)


def test_predictions_equal_those_of_the_test(measured: Path, data: Path, tmp_path: Path) -> None:
    dataset = ArrowDataset(SENSORS, data, "test")
    lines = ["id,sound,motion,light"]
    for row in range(7):
        cells = [str(row)]
        for name, array in dataset[0, row].inputs.items():
            np.save(tmp_path / f"{name}{row}.npy", array.numpy())
            cells.append("" if row == 3 and name != "motion" else f"{name}{row}.npy")
        lines.append(",".join(cells))
    (tmp_path / "in.csv").write_text("\n".join(lines))
    output = tmp_path / "out.jsonl"
    options = [f"load_path={measured.parent / 'best.ckpt'}", f"input={tmp_path / 'in.csv'}", f"output={output}"]
    assert call("predict", "precision=32", "num_workers=0", *options) == 0
    found = [json.loads(line) for line in output.read_text().splitlines()]
    assert [one["missing"] for one in found] == [TYPE_NAMES[5 if row == 3 else 0] for row in range(7)]
    table = pa.ipc.open_file(pa.memory_map(str(measured / "logits.arrow"))).read_all()
    for row, one in enumerate(found):
        logits = table["logits_sound_light_missing" if row == 3 else "logits_complete"][row].as_py()
        expected = torch.tensor(logits).softmax(0).tolist()
        assert list(one["probabilities"].values()) == pytest.approx(expected, abs=1e-6)
        assert list(one["probabilities"]) == list(SENSORS.class_names or ())


def test_the_table_of_runs_and_the_report_show_the_modalities(measured, data, tmp_path, capsys):
    assert call("runs", f"log_dir={data / 'result'}") == 0
    assert "70 % some" in (said := capsys.readouterr().out) and "gadgets" in said
    assert call("report", f"runs={data / 'result'}", f"out={tmp_path / 'report'}") == 0
    page = page_text(tmp_path / "report")
    assert "Sensors" in page and "without motion + light" in page and "without sound + light" in page
    rows = read_csv(tmp_path / "report" / "tables" / "matrix_gadgets.csv")
    assert {row["missing_type"] for row in rows} == set(TYPES)
    half = {row["missing_type"]: row for row in read_csv(measured / "matrix.csv") if float(row["ratio"]) == 0.5}
    available = {kind: [float(row[f"{name}_available"]) for name in SENSORS.modalities] for kind, row in half.items()}
    assert available["light"] == [100, 100, 50]
    assert sum(available["any"]) == pytest.approx(250, abs=0.01)  # 7 of 14 samples lose one modality
    assert 200 < sum(available["some"]) < 250  # or two


def test_defaults_depend_on_the_modalities(registered: None, data: Path) -> None:
    """In training, complete samples may lose any combination of them."""
    options = check({**DEFAULTS, "task": "gadgets", "data_root": str(data)})
    assert set(options.missing_type.values()) == {"any"} and options.test_type is None
    assert options.robustness_types == options.sweep_types == TYPES
    dataset = ArrowDataset(SENSORS, data, "train")
    dataset.simulate_seed = 0
    seen = {tuple(dataset[epoch, index].inputs) for epoch in range(5) for index in range(24)}
    assert len(seen) == 7 and () not in seen


# Arrays


def test_arrays_of_varying_length_are_padded_in_front(registered: None, data: Path) -> None:
    dataset = ArrowDataset(SENSORS, data, "val")
    batch = collate(kinds_of(SENSORS), dataset.__getitems__([(0, index) for index in range(9)]))
    stored = [np.array(waves, dtype=np.float32) for waves in dataset.table["waves"].to_pylist()]
    longest = max(map(len, stored))
    assert batch.inputs["sound"].shape == (9, longest, 4) and batch.inputs["sound"].dtype == torch.float32
    assert batch.length_b["sound"].tolist() == [len(waves) for waves in stored]
    for padded, waves in zip(batch.inputs["sound"].numpy(), stored, strict=True):
        assert np.array_equal(padded, np.pad(waves, ((longest - len(waves), 0), (0, 0))))
    assert batch.inputs["light"].tolist() == dataset.table["light"].to_pylist()
    lengths = [len(stored[index]) for index in dataset.evaluation_order()]
    assert lengths == sorted(lengths, reverse=True)


VARYING, NESTED = pa.list_(pa.float32()), pa.list_(pa.list_(pa.float32()))


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("motion", pa.array([[1.0] * 6, [1.0] * 5], VARYING), r"motion: .*shape \(6,\), found the size 5"),
        ("motion", pa.array([[1.0] * 6] * 2, pa.list_(pa.float64())), "motion: expected arrays of float32"),
        ("motion", pa.array([1.0, 2.0], pa.float32()), r"motion: expected arrays of shape \(6,\), found float"),
        ("motion", pa.array([[1.0] * 5 + [None]] * 2, VARYING), "motion: .*without nulls"),
        ("waves", pa.array([[[1.0] * 4], []], NESTED), r"waves: .*found the size 0"),
    ],
)
def test_arrays_of_another_shape_or_type_are_refused(registered, tmp_path, column, values, message):
    table = sensor_rows("val").slice(0, 2)
    write(tmp_path / "gadgets_val.arrow", table.set_column(table.column_names.index(column), column, values))
    with pytest.raises(DataError, match=message):
        ArrowDataset(SENSORS, tmp_path, "val")


def test_non_finite_numbers_are_refused_with_their_row(registered: None, tmp_path: Path) -> None:
    values = pa.array([[1.0] * 6, [1.0] * 5 + [float("nan")]], pa.list_(pa.float32()))
    table = sensor_rows("val").slice(0, 2)
    write(tmp_path / "gadgets_val.arrow", table.set_column(1, "motion", values))
    dataset = ArrowDataset(SENSORS, tmp_path, "val")
    assert set(dataset[0, 0].inputs) == set(SENSORS.modalities)
    with pytest.raises(ValueError, match="expected finite numbers, found none"):
        ArrayKind.read_given(np.zeros((0, 3)), Modality("array", "motion", (9, 3), padded=True), InputFormat())
    with pytest.raises(DataError, match=r"gadgets_val.arrow: row 1: column motion: expected finite numbers"):
        dataset[0, 1]


@pytest.mark.parametrize(
    ("array", "reason"),
    [(np.zeros(5), r"shape \(6,\), found \(5,\)"), (np.full(6, np.inf), "finite"), (None, "No such file")],
)
def test_invalid_arrays_to_predict_from_are_refused(trained, tmp_path, array, reason, capsys):
    if array is not None:
        np.save(tmp_path / "a.npy", array)
    (tmp_path / "in.csv").write_text("motion\na.npy\n")
    options = [f"load_path={trained['any'] / 'best.ckpt'}", f"input={tmp_path / 'in.csv'}", f"output={tmp_path}/o.csv"]
    assert call("predict", "num_workers=0", *options) == 2
    said = capsys.readouterr().err
    assert "in.csv, row 2: motion" in said and reason.replace("\\", "") in said
