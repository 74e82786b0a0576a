"""The progress bar on a terminal of 80 columns: one complete line, with log lines above it."""

import io
import logging
import re
from pathlib import Path

import pytest
from rich.console import Console

from common.logs import set_up_logging, without_repeats
from engine import progress, trainer
from engine.progress import RunBar
from run import command_line
from tests.conftest import Patch, Workspace

CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@pytest.fixture
def screen(monkeypatch: Patch) -> io.StringIO:
    """The output of a run on a terminal of 80 columns, with every refresh."""
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=80, color_system=None)
    monkeypatch.setattr(trainer, "RunBar", lambda *given: RunBar(*given, console=console))  # type: ignore[misc]
    monkeypatch.setattr(progress, "REFRESH_S", 0.0)
    return file


def lines_of(screen: io.StringIO) -> list[str]:
    return [line.rstrip() for line in re.split(r"[\r\n]+", CONTROL.sub("", screen.getvalue())) if line.strip()]


def small(workspace: Workspace, log_dir: Path, *options: str) -> list[str]:
    return workspace.command(f"vit={workspace.backbone}", f"log_dir={log_dir}", "val_check_interval=0.5", *options)


def test_a_run_has_one_bar_with_log_lines_above(workspace, tmp_path, screen):
    assert command_line(small(workspace, tmp_path)) == 0
    lines = lines_of(screen)
    assert max(map(len, lines)) <= 80
    bars = [line for line in lines if "━" in line or "╸" in line]
    training = [line for line in bars if line.startswith("epoch ")]
    assert {line.split()[1] for line in training} == {"1/2", "2/2"}
    whole = r"epoch 2/2  loss \d\.\d{4}  f1_macro \d\.\d{4} [━╸╺]+ [\d,]+/s  \d+ s left"
    assert re.fullmatch(whole, training[-1]), training[-1]
    assert training[-1].endswith(" 0 s left"), "the last batch of the last epoch is the end"
    assert any(line.startswith("test ") for line in bars)
    logged = [line for line in lines if re.match(r"epoch \d, step \d+: ", line)]
    assert len(logged) == 4 and all(
        re.fullmatch(r"epoch \d, step \d+: train/loss .* val/f1_macro \d\.\d{4}", line) for line in logged
    )
    assert not [line for line in lines if "v_num" in line]


def test_without_a_terminal_nothing_is_drawn(workspace: Workspace, tmp_path: Path, monkeypatch: Patch) -> None:
    file = io.StringIO()
    monkeypatch.setattr(trainer, "RunBar", lambda *given: RunBar(*given, console=Console(file=file)))  # type: ignore[misc]
    assert command_line(small(workspace, tmp_path, "max_epoch=1", "test_after_fit=False")) == 0
    assert file.getvalue() == ""


def test_log_lines_go_to_the_current_standard_error(monkeypatch: Patch) -> None:
    set_up_logging()
    file = io.StringIO()
    monkeypatch.setattr("sys.stderr", file)
    logging.getLogger("rep").info("above the bar")
    assert file.getvalue() == "above the bar\n"


def test_repeated_lines_are_left_out_only_within_the_block(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("rep")
    with caplog.at_level("INFO"):
        with without_repeats(logger):
            for number in (1, 1, 2, 1):
                logger.info("run %d", number)
        logger.info("run %d", 1)
    assert caplog.messages == ["run 1", "run 2", "run 1", "run 1"]
