"""Several trained models: teacher and student, and averaged logits."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from clip.modules.dpl import DecoupledPrototypes
from clip.modules.heads import LinearHead
from demo import best
from engine.checkpoint import read_checkpoint
from engine.decision import with_offset
from engine.ensemble import merged_checkpoint, open_models
from engine.families import BackboneChoice
from engine.predict import load_model
from engine.tasks import TASKS
from engine.training import FinetuneModule, model_input
from run import command_line
from runs import training
from tests.conftest import Workspace, call, read_json
from tests.custom_files import read_arrow
from tests.data_files import LOGIT_COLUMNS
from vilt.datamodules import collate
from vilt.datasets.kinds import kinds_of


@pytest.fixture(scope="module")
def members(workspace: Workspace) -> list[Path]:
    """Two checkpoints: a head alone, and one with prompts."""
    return [
        workspace.train(f"member_{method}", f"prompt_type={method}", "test_after_fit=False") / "best.ckpt"
        for method in ("none", "coop")
    ]


def listed(members: list[Path]) -> str:
    return f"load_path=[{','.join(map(str, members))}]"


@pytest.mark.parametrize("teacher", [0, 1])  # with cached features, and through the towers
def test_a_teacher_sees_everything_the_missing_table_leaves(workspace, tmp_path, members, teacher, monkeypatch, capsys):
    seen: list[tuple[Any, Tensor, Tensor, Tensor]] = []
    step = FinetuneModule._step

    def recording_step(self: FinetuneModule, inputs: Any, labels: Tensor, counted: int) -> Any:
        loss, logits, own = step(self, inputs, labels, counted)
        assert self.soft_labels is not None
        soft = self.soft_labels[inputs.index_B]
        hard_loss, soft_loss = (self.task.loss(logits[:counted], y[:counted]) for y in (labels, soft))
        torch.testing.assert_close(loss, (hard_loss + soft_loss) / 2)
        seen.append((self._data.datasets["train"], self.soft_labels, inputs.index_B, inputs.present_BM))
        return loss, logits, own

    monkeypatch.setattr(FinetuneModule, "_step", recording_step)
    monkeypatch.setattr(LinearHead, "logit_scale", DecoupledPrototypes.logit_scale)  # treat logits as cosines
    options = (f"vit={workspace.backbone}", f"log_dir={tmp_path}", "prompt_type=none", "test_after_fit=False")
    student = workspace.command(*options, f"teacher={members[teacher]}", "simulate_missing=True", "exp_name=student")
    assert command_line(student) == 0
    dataset, soft, *_ = seen[0]
    present = torch.tensor([[missing != 2, missing != 1] for missing in dataset.missing_type_of_sample])
    assert any((now != present[index]).any() for _, _, index, now in seen), "the student sees less"
    checkpoint = read_checkpoint(members[teacher])
    model, _ = open_models([checkpoint], BackboneChoice(), "")
    dataset.cached = dataset.simulate_seed = None
    batch = collate(kinds_of(dataset.spec), dataset.__getitems__([(0, number) for number in range(len(dataset))]))
    torch.testing.assert_close(soft, (32 * model.eval()(model_input(batch))).sigmoid().detach(), rtol=1e-3, atol=1e-4)
    contents = read_json(tmp_path / "student_seed0" / "version_0" / "contents.json")
    assert contents["teacher"] == checkpoint.sha256
    moved = shutil.copy(members[teacher], tmp_path / "moved.ckpt")
    again = [word.replace(str(members[teacher]), str(moved)) for word in student]
    assert command_line([*again, "resume_from=auto"]) == 0
    assert "nothing left to do" in capsys.readouterr().err
    exported = tmp_path / "exported"
    assert call("export", f"load_path={moved}", f"out={exported}") == 0
    shared = [word.replace(str(members[teacher]), str(exported)) for word in student]
    assert command_line([*shared, "exp_name=by_exported", "max_epoch=1"]) == 0
    torch.testing.assert_close(seen[-1][1], soft, rtol=1e-3, atol=1e-4)


def test_a_teacher_with_neighbours_needs_its_own_training_split(workspace, tmp_path, monkeypatch, capsys):
    """It is refused before the frozen towers run, which takes hours."""
    options = ("prompt_type=none", "test_after_fit=False")
    best = workspace.train("with_neighbours", *options, "neighbours=2", log_dir=tmp_path) / "best.ckpt"
    stored = torch.load(best, weights_only=True)
    stored["rep"]["contents"]["data of train"] = "0" * 64
    torch.save(stored, best)
    capsys.readouterr()
    monkeypatch.setattr(training, "cache_features", None)
    places = (f"vit={workspace.backbone}", f"log_dir={tmp_path}", f"teacher={best}", "exp_name=taught")
    assert command_line(workspace.command(*options, *places)) == 2
    assert f"teacher={best}: expected one trained on {workspace.arrow}" in capsys.readouterr().err


def test_testing_robustness_and_predict_average_logits(workspace, tmp_path, members, capsys):
    both, out = listed(members), f"log_dir={tmp_path}"
    command = [word for word in workspace.command(both, out) if not word.startswith(("memory_", "prompt_"))]
    assert command_line([*command, "test_only=True", "test_exp_name=together"]) == 0
    cells = ("bootstrap=0", "robustness_seeds=[0]", "robustness_types=both", "robustness_ratios=[0,0.7]")
    assert command_line([command[0], "robustness", *command[1:], *cells]) == 0
    [trained] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("trained at")]
    assert trained.count("70 % both") == 3, "the mean has no run of its own and shows what its members share"
    stored = [read_arrow(one.parent / "robustness" / "logits.arrow") for one in members]
    mean_logits = torch.tensor([[table[name].to_pylist() for name in LOGIT_COLUMNS] for table in stored]).mean(0)
    labels = torch.tensor(stored[0]["label"].to_pylist())
    one = merged_checkpoint([read_checkpoint(path) for path in members])
    task = with_offset(TASKS["mmimdb"], one.offset)
    [found] = tmp_path.glob("mean_*/robustness/robustness.json")
    results = read_json(found)
    for kind, logits_NC in zip(results["by_type"].values(), mean_logits, strict=True):
        assert kind == pytest.approx(task.metrics(logits_NC, labels))
    tested = read_json(tmp_path / "together" / "version_0" / "test_results.json")
    assert tested["checkpoint_sha256"] == results["checkpoint_sha256"] == one.sha256
    [cell] = [cell for cell in results["cells"] if cell["ratio"] == 0.7]
    assert tested["metrics"]["f1_macro"] == pytest.approx(cell["metrics"]["f1_macro"]["mean"])
    table = tmp_path / "samples.csv"
    table.write_text("text\nA ghost.\nTwo friends.\n")
    assert call("predict", both, f"input={table}", f"output={tmp_path / 'p.jsonl'}", "precision=32") == 0
    texts = ["A ghost.", "Two friends."]
    single = [load_model(path).predict(texts=texts) for path in members]
    rows = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    for number, row in enumerate(rows):
        for name, probability in load_model(members).predict(texts=texts)[number].probabilities.items():
            logits = [torch.tensor(of[number].probabilities[name]).logit() for of in single]
            assert probability == pytest.approx(float(torch.stack(logits).mean().sigmoid()), abs=1e-4)
            assert row["probabilities"][name] == pytest.approx(probability, abs=1e-4)


def test_averaging_cosines_with_logits_gives_a_warning(members: list[Path], caplog: pytest.LogCaptureFixture) -> None:
    first = read_checkpoint(members[0])
    cosines = replace(first, spec=replace(first.spec, head="dpl"))
    with caplog.at_level("WARNING", "rep"):
        merged_checkpoint([first, first])
        merged_checkpoint([cosines, cosines])
        assert not caplog.records
        merged_checkpoint([first, cosines])
    assert "head=dpl are cosines" in caplog.text


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("prompt_type=none",), ("load_path", "one checkpoint", "2")),
        (("prompt_type=none", "test_only=True", "head=dpl"), ("head", "dpl")),
    ],
)
def test_several_checkpoints_are_refused_for_training_and_with_contradictory_options(
    workspace, members, options, said, capsys
):
    assert command_line(workspace.command(listed(members), *options)) == 2
    message = capsys.readouterr().err
    assert all(word in message for word in said)


def test_prompts_can_start_from_a_head_trained_without_prompts(
    workspace: Workspace, tmp_path: Path, members: list[Path]
) -> None:
    """The head's weights are loaded; the prompts are initialised as usual."""
    options = ("finetune_first=True", "prompt_type=dcp", "learning_rate=1e-12", "max_epoch=1")
    folder = workspace.train("on", f"load_path={members[0]}", *options, log_dir=tmp_path)
    state = read_checkpoint(folder / "best.ckpt").state
    for name, value in read_checkpoint(members[0]).state.items():
        assert name.startswith("mmimdb_classifier.")
        torch.testing.assert_close(state[name], value)


@pytest.mark.parametrize(
    ("best_rate", "tried"),
    [(0.01, (0.003, 0.01, 0.03)), (0.001, (0.003, 0.01, 0.03, 0.001)), (0.1, (0.003, 0.01, 0.03, 0.1))],
)
def test_the_recipe_searches_rates_then_epochs(best_rate, tried, tmp_path, monkeypatch):
    asked: list[tuple[float, int, int]] = []

    def run(bench: best.Bench, name: str, seed: int, options: dict[str, Any]) -> best.Result:
        rate, epochs = options["learning_rate"], options["max_epoch"]
        asked.append((rate, epochs, seed))
        score = epochs / 100 - abs(math.log(rate / best_rate))
        return best.Result(tmp_path / name, score, 0.0, 0.0)

    monkeypatch.setattr(best.Bench, "run", run)
    best.Bench({}, tmp_path, [20, 10, 40]).at_best_setting("head", range(3), {seed: {} for seed in range(3)})
    assert {rate for rate, epochs, seed in asked if epochs == 20} == set(tried)
    assert [one for one in dict.fromkeys(asked) if one[1] != 20] == [
        (best_rate, 10, 0),
        (best_rate, 40, 0),
        (best_rate, 40, 1),
        (best_rate, 40, 2),
    ]


def test_one_command_trains_the_recipe_and_reuses_its_results(workspace, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(best, "RATES", (0.001, 0.01, 0.02, 0.03))
    monkeypatch.setattr(best, "STEPS", {"head": {"prompt_type": "none"}, "+ whole texts": {"text_windows": 2}})
    words = [word for word in workspace.command("max_epoch=1", "val_check_interval=1.0")[3:] if "root" not in word]
    options = [word for word in words if not word.startswith("log_dir")]
    places = ["--data", str(workspace.arrow), "--vit", str(workspace.backbone), "--out", str(tmp_path)]
    again = []
    for _ in ("trained", "what is there"):
        assert best.main([*places, "--methods", "--epochs", "1", "--seeds", "1", "--no-slots", *options]) == 0
        again.append((capsys.readouterr().out, sorted(tmp_path.glob("*_seed0/version_*"))))
    assert again[0] == again[1]
    rows = {line.split("  ")[0].strip(): line.split() for line in again[0][0].splitlines() if line.startswith("recipe")}
    assert list(rows) == ["recipe: head", "recipe: + whole texts", "recipe: mean of 1"]
    tested = read_json(tmp_path / "mean_of_1_seed0" / "version_0" / "test_results.json")["metrics"]
    assert f"{100 * tested['f1_macro']:.1f}" in rows["recipe: mean of 1"]
