"""Parsing the command line: texts stay as typed, whatever their source, and near misses get hints."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from lightning_utilities.core.rank_zero import rank_zero_only

from common.errors import ConfigError
from config import DEFAULTS, OPTIONS
from run import COMMANDS, command_line
from runs.check_options import read_options, values_of_options
from runs.command_line import CommandLine, is_text, read_command_line, written
from tests.conftest import Captured, Patch

TYPED = (
    *("1.10", "12e400", "1_000", "2024_11", "007", "0x10", "1e3", "1E5", "-0", "+1", ".5", "2024-11-05", "inf", "nan"),
    *("True", "true", "[1,2]", "(1)", "{1}", "1+2j", "...", "a b", "it's", "b'x'", "12:30", "#1", "a=b", "~", "é", "𝟙"),
)


def read(*words: str) -> CommandLine:
    return read_command_line(words, COMMANDS)


def values(*words: str) -> dict[str, Any]:
    return read("with", *words).updates


@pytest.mark.parametrize("text", TYPED)
def test_text_options_keep_exactly_what_was_typed(text: str, tmp_path: Path) -> None:
    """On the command line, in quotes, in a file, in a sweep, and when a sweep passes it on to its runs."""
    assert values(f"exp_name={text}") == values(f"exp_name={text!r}") == {"exp_name": text}
    assert values(f"data_root={text}", f"tokenizer={text}") == {"data_root": text, "tokenizer": text}
    file = tmp_path / "options.json"
    file.write_text(json.dumps({"exp_name": text, "tokenizer": text}))
    assert values(str(file)) == {"exp_name": text, "tokenizer": text}
    over = values(f"sweep_over.vit={[text]}", f"search.tokenizer={[text, None]}")
    assert values_of_options("sweep_over", over["sweep_over"]) == {"vit": (text,)}
    assert values_of_options("search", over["search"]) == {"tokenizer": (text, None)}
    assert values(written("vit", text)) == {"vit": text}


@pytest.mark.parametrize("text", ["1.10", "1_000", "2024_11", "007", "1e3", "12e400", "True", "a b"])
def test_texts_in_lists_need_no_quotes(text: str) -> None:
    given = values(f"runs=[{text}, b]", f"sweep_over.vit=[{text},b]", f"sweep_over.tokenizer=[None,{text}]")
    assert read_options({**DEFAULTS, **given}, ["runs"])["runs"] == (Path(text), Path("b"))
    assert values_of_options("sweep_over", given["sweep_over"]) == {"vit": (text, "b"), "tokenizer": (None, text)}


@pytest.mark.parametrize("number", ["1.10", "1e3", "2024"])
def test_a_number_in_a_file_or_dictionary_is_refused_for_a_text_option(number: str, tmp_path: Path) -> None:
    """Its original spelling has been lost by then."""
    file = tmp_path / "options.json"
    file.write_text(f'{{"exp_name": {number}, "runs": [{number}], "seed": 3}}')
    given = values(str(file), f"sweep_over={{'vit': [{number}]}}")
    for name in ("exp_name", "runs"):
        with pytest.raises(ConfigError, match=rf"^{name}: .*quotes.*{float(number):g}"):
            read_options({**DEFAULTS, **given}, [name])
    with pytest.raises(ConfigError, match=rf"sweep_over\.vit: .*quotes.*{float(number):g}"):
        values_of_options("sweep_over", given["sweep_over"])


def test_none_unsets_options_that_are_optional() -> None:
    optional = ("tokenizer", "load_path", "precision")
    assert values(*(f"{name}=None" for name in optional)) == dict.fromkeys(optional)
    assert values("tokenizer='None'", "exp_name=None") == {"tokenizer": "None", "exp_name": "None"}
    assert values(written("tokenizer", None)) == {"tokenizer": None}
    assert values(written("tokenizer", "None")) == {"tokenizer": "None"}


def test_text_options_are_recognised() -> None:
    texts = {name for name in OPTIONS if is_text(name)}
    assert texts >= {
        "exp_name",
        "data_root",
        "vit",
        "tokenizer",
        "load_path",
        "resume_from",
        "runs",
        "out",
        "sweep_name",
    }
    others = {"seed", "decay_power", "warmup_steps", "missing_ratio", "far", "num_gpus", "sweep_over", "search"}
    assert not texts & others


@pytest.mark.parametrize("method", ["dcp", "rep"])
def test_dcp_names_of_options_are_accepted(method: str, tmp_path: Path) -> None:
    given = values(f"prompt_type={method}", "prompt_length=9", "prompt_depth=1")
    assert given == {"prompt_type": method, "memory_length": 9, "memory_depth": 1}
    assert values("prompt_type=mplmm", "prompt_length=9") == {"prompt_type": "mplmm", "prompt_length": 9}
    (tmp_path / "options.json").write_text('{"prompt_depth": 2}')
    assert values(str(tmp_path / "options.json")) == {"memory_depth": 2}


def test_other_values_are_parsed_as_python_literals() -> None:
    given = values("seed=3", "learning_rate=1e-3", "far=False", "sweep_ratios=[0.5,0.9]", "missing_type=text")
    assert given == {
        "seed": 3, "learning_rate": 0.001, "far": False, "sweep_ratios": [0.5, 0.9], "missing_type": "text"
    }  # fmt: skip
    assert values("sweep_slurm.partition=1.10", "sweep_slurm.timeout_min=30", "sweep_slurm.account=007") == {
        "sweep_slurm": {"partition": "1.10", "timeout_min": 30, "account": "007"}
    }


def test_setting_one_entry_keeps_the_others(tmp_path: Path) -> None:
    assert values("missing_ratio=0.5", "missing_ratio.train=0.3")["missing_ratio"] == {
        "train": 0.3, "val": 0.5, "test": 0.5
    }  # fmt: skip
    assert values("missing_ratio.train=0.3")["missing_ratio"] == {"train": 0.3}
    (tmp_path / "a.json").write_text('{"missing_ratio": 0.5, "missing_ratio.val": 0.2}')
    assert values("missing_ratio.train=0.3", str(tmp_path / "a.json"))["missing_ratio"] == {
        "train": 0.3, "val": 0.2, "test": 0.5
    }  # fmt: skip
    assert values("ablation", "sweep_over.far=[True]")["sweep_over"] == {"far": [True], "fmb": [False, True]}


def test_typed_options_override_files_and_later_files_override_earlier_ones(tmp_path: Path) -> None:
    for name, seed in (("a.json", 1), ("b.json", 2)):
        (tmp_path / name).write_text(f'{{"seed": {seed}, "task": "food101"}}')
    files = [str(tmp_path / name) for name in ("a.json", "b.json")]
    assert values(*files, "task_finetune_mmimdb") | {"exp_name": ""} == {"seed": 2, "task": "mmimdb", "exp_name": ""}
    assert values("seed=3", *files)["seed"] == 3


def test_a_runs_config_can_be_given_as_an_options_file(tmp_path: Path) -> None:
    """It holds all options and the description of a custom dataset."""
    chosen = {"custom": {"name": "pets"}, "compile": False, "seed": 5, "exp_name": "x"}
    (tmp_path / "config.json").write_text(json.dumps({**DEFAULTS, **chosen}))
    found = read("sweep", "with", str(tmp_path / "config.json"))
    assert found.given == DEFAULTS.keys() and found.chosen == {"seed"}


@pytest.mark.parametrize(
    "flag", [["-F", "1.10"], ["-F1.10"], ["-F=1.10"], ["--file_storage=1.10"], ["--file_storage", "1.10"]]
)
@pytest.mark.parametrize("first", [True, False])
def test_the_record_folder_can_be_given_in_every_form(flag: list[str], first: bool) -> None:
    words = ["with", "seed=1"]
    found = read(*flag, *words) if first else read(*words, *flag)
    assert (found.record, found.updates) == ("1.10", {"seed": 1})


def test_closing_the_pipe_while_help_is_printed_is_no_error() -> None:
    command = f"{sys.executable} run.py print_config | head -1; exit ${{PIPESTATUS[0]}}"
    root = Path(__file__).parents[1]
    done = subprocess.run(["bash", "-c", command], cwd=root, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("place", ["/proc/x", "/dev/null/x", "/dev/null"])
def test_a_record_folder_that_cannot_be_created_is_refused(place: str, capsys: Captured) -> None:
    assert command_line(["run.py", "with", "-F", place]) == 2
    assert f"error: -F {place}: cannot be created: " in capsys.readouterr().err


@pytest.mark.parametrize("rank", [0, 1])
def test_only_the_first_process_writes_the_record(rank: int, tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", rank, raising=False)
    assert command_line(["run.py", "with", "learning_rate=-1", "-F", str(tmp_path / "record")]) == 2
    assert (tmp_path / "record" / "1").is_dir() is (rank == 0)


WRONG = {
    "with seed=1 -F": ("-F", "expected one argument"),
    "with -F seed=1": ("-F", "a folder"),
    "with -F task_finetune_mmimdb": ("-F", "a folder"),
    "-F with seed=1": ("-F", "a folder"),
    "runs -F a": ("-F", "runs"),
    "with --learning_rate=0.1": ("--learning_rate=0.1", "name=value", "-F FOLDER"),
    "task_finetune_mmimdb data_root=x": ("`with`", "run.py with task_finetune_mmimdb"),
    "seed=1": ("`with`", "run.py with seed=1"),
    "robustness load_path=x": ("`with`", "run.py robustness with load_path=x"),
    "robustnes with load_path=x": ("'robustnes'", "did you mean robustness?"),
    "sweep with sweep_seeds=[0, 1]": ("sweep_seeds=[0, 1]", "spaces"),
    "sweep with sweep_over={'far': [True]}": ("sweep_over", "spaces"),
    "with exp_name = x": ("exp_name", "spaces", "exp_name=rep"),
    "with exp_name =x": ("exp_name", "spaces", "exp_name=rep"),
    "with exp_name= x": ("exp_name= x", "spaces"),
    "with =3": ("=3", "name=value"),
    "with lr=1": ("unknown option lr", "learning_rate"),
    "with method=rep": ("unknown option method", "prompt_type"),
    "with backbone=x": ("unknown option backbone", "vit"),
    "with learning_rat=1": ("unknown option learning_rat", "learning_rate"),
    "with max_text_len=3": ("max_text_len", "ViLT"),
    "with task_mlm_itm": ("task_mlm_itm", "ViLT"),
    "with task_finetune_vqa_randaug": ("task_finetune_vqa_randaug", "ViLT"),
    "with prompt_length=9": ("prompt_length", "memory_length", "prompt_type"),
    "with seed.x=1": ("unknown option seed.x",),
    "with missing_ratio.tran=1": ("unknown option missing_ratio.tran;", "missing_ratio.train?"),
    "with prompt_type=map": ("prompt_type", "found 'map'", "did you mean map_input?"),
    "with prompt_type=mpl": ("prompt_type", "did you mean mplmm?"),
    "with task=mimdb": ("task", "did you mean mmimdb?"),
    "with task_finetune_mmimd": ("task_finetune_mmimdb?",),
    "with nowhere.json": ("nowhere.json", "no such file"),
    "with seed=4294967296": ("seed", "4294967295"),
}


@pytest.mark.parametrize("line", WRONG)
def test_near_misses_give_one_line_with_a_hint(line, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command_line(["run.py", *line.split()]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith("error: ")
    assert all(fact in said[0] for fact in WRONG[line]), said[0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("words", [["{}", "--help"], ["{}", "with", "seed=1", "-h"], ["{}", "-h", "seed"]])
def test_help_for_a_command_lists_its_options(
    command: str, words: list[str], capsys: Captured, monkeypatch: Patch
) -> None:
    monkeypatch.setenv("COLUMNS", "90")
    assert command_line(["run.py", *(word.format(command) for word in words)]) == 0
    shown = capsys.readouterr().out
    own = [name for name, option in OPTIONS.items() if option.help.startswith(f"{command}: ")]
    assert all(re.search(rf"^  {name}=", shown, re.MULTILINE) for name in own)
    others = {"predict": "load_path", "sweep": "learning_rate", "robustness": "load_path"}
    others |= dict.fromkeys(("main", "doctor", "features"), "vit=")
    assert others.get(command, "") in shown and max(map(len, shown.splitlines())) <= 90
    assert "sweep_seeds" in shown if command == "sweep" else "sweep_seeds" not in shown
