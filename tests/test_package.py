"""`pip install .` installs a package `rep` that works alongside OpenAI's `clip`, and a command `rep`."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from runs.python_interface import as_words_of_run
from tests.conftest import Workspace

ROOT = Path(__file__).parents[1]
STAND_IN = 'def tokenize(texts):\n    return "tokens of the other clip"\n'
USE = """
import sys
import clip, rep
assert clip.tokenize(["a"]) == "tokens of the other clip" and "torch" not in sys.modules
assert dir(rep) == ["__version__", "convert", "load_model", "robustness"] and rep.__version__ == "1.0.0"
model = rep.load_model(sys.argv[1])
assert [found.missing for found in model.predict(texts=["A train.", "A ghost."])] == ["image missing"] * 2
found, = rep.robustness(sys.argv[1], bootstrap=0, robustness_seeds=[0], robustness_ratios=[0.5], num_workers=0)
assert [cell["ratio"] for cell in found["cells"]] == [0.5] * 3
assert clip.tokenize(["a"]) == "tokens of the other clip"
assert not {"config", "common", "engine", "runs", "vilt"} & set(sys.modules)
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the installed wheel and another package named clip."""
    folder = tmp_path_factory.mktemp("package")
    folder.joinpath("checkout").mkdir()
    named = (ROOT / name for name in ("pyproject.toml", "requirements.txt", "LICENSE"))
    for path in (*ROOT.glob("*.py"), *ROOT.glob("*.md"), *named):
        shutil.copy(path, folder / "checkout")
    for path in ROOT.glob("*/__init__.py"):
        if path.parent.name != "tests":
            shutil.copytree(path.parent, folder / "checkout" / path.parent.name)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", str(folder / "site"), str(folder / "checkout")], check=True)
    (folder / "site" / "clip").mkdir()
    (folder / "site" / "clip" / "__init__.py").write_text(STAND_IN)
    return folder / "site"


def test_help_and_errors_name_the_command(site: Path, tmp_path: Path) -> None:
    """The scripts of a checkout are not installed."""
    commands = [["--help"], ["sweep", "--help"], ["convert", "--help"], ["train"], ["train", "with", "seeed=1"]]
    commands += [["train", "with", "task_finetune_mmimdb", "data_root=nowhere"]]
    said = ""
    for words in commands:
        command = [str(site / "bin" / "rep"), *words]
        environment = {**os.environ, "PYTHONPATH": str(site)}
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        said += result.stdout + result.stderr
    for fact in ("`rep COMMAND --help`", "rep sweep with name=value", "usage: rep convert [-h] --dataset"):
        assert fact in said, said
    for fact in ("as in `rep with task_", "`rep print_config` lists", "`rep convert --dataset mmimdb --root RAW"):
        assert fact in said, said
    assert "run.py" not in said and "make_arrow" not in said


def test_an_installed_rep_works_alongside_another_clip(workspace: Workspace, site: Path, tmp_path: Path) -> None:
    def call(*words: str) -> str:
        environment = {**os.environ, "PYTHONPATH": str(site)}
        result = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        return result.stdout

    rep = str(site / "bin" / "rep")
    options = workspace.command(f"vit={workspace.backbone}", "exp_name=installed", "max_epoch=1")[2:]
    call(rep, "train", "with", *options, f"log_dir={tmp_path / 'result'}", "test_after_fit=False")
    best = tmp_path / "result" / "installed_seed0" / "version_0" / "best.ckpt"
    files = {"best.ckpt", "last.ckpt", "config.json", "contents.json", "environment.json", "metrics.csv", "tensorboard"}
    assert {path.name for path in best.parent.iterdir()} == files
    assert "installed_seed0" in call(rep, "runs", "with", f"log_dir={tmp_path / 'result'}")
    assert (tmp_path / "result" / "runs.csv").is_file()
    call(sys.executable, "-c", USE, str(best))


def test_train_and_test_are_names_for_run_py_without_a_command() -> None:
    assert as_words_of_run("train", ["with", "seed=1"]) == ["main", "with", "seed=1"]
    assert as_words_of_run("test", ["with", "seed=1"]) == ["main", "with", "seed=1", "test_only=True"]
    assert as_words_of_run("test", ["--help"]) == ["main", "--help"]
    assert as_words_of_run("runs", []) == ["runs"]
