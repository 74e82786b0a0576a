"""What writes files is killed at random moments, or meets a full disk: the old state or the new one, never a part."""

import os
import random
import re
import shutil
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from run import command_line
from tests.conftest import Workspace
from tests.interrupted import CONTEXT
from tests.writers import TRAINED, WRITERS, run_writer

KILLS = 20 if os.environ.get("TEST_LONG") else 2
"""Of each writer."""


class End(NamedTuple):
    """How a writer ended."""

    status: int
    said: str
    seconds: float
    """From when it began to write to when all was written, or it was killed."""
    wrote: bool
    """Whether it did, beside the target."""


class Trial:
    """A writer, and a folder that can be put back to the old state."""

    def __init__(self, name: str, workspace: Workspace, top: Path) -> None:
        self.name = name
        self.writer = WRITERS[name]
        self.workspace = workspace
        self.folder = top / "folder"  # always the same, since some files hold their place
        self._before = top / "before"
        self.folder.mkdir()
        self.writer.prepare(self.folder, workspace)
        shutil.copytree(self.folder, self._before)
        self.old = self.read()

    def restore(self) -> None:
        shutil.rmtree(self.folder)
        shutil.copytree(self._before, self.folder)

    def read(self) -> Any:
        return self.writer.read(self.folder)

    def names(self) -> set[str]:
        return {str(path.relative_to(self.folder)) for path in self.folder.rglob("*")}

    def run(self, *, kill_after: float | None = None, room: int | None = None) -> End:
        """Starts the writer and waits for its end, or kills it so many seconds after it began to write."""
        (reader, said), (heard, signals) = CONTEXT.Pipe(duplex=False), CONTEXT.Pipe(duplex=False)
        arguments = (self.name, self.folder, self.workspace, said, signals, room)
        process = CONTEXT.Process(target=run_writer, args=arguments)
        process.start()
        said.close()
        signals.close()
        assert heard.poll(60), "does not begin"
        wrote = heard.recv() == "begins"  # or it has found all done
        start = time.monotonic()
        if kill_after is not None:
            time.sleep(kill_after)
            process.kill()
        elif wrote:
            assert heard.poll(60), "does not end"
        seconds = time.monotonic() - start
        process.join(60)
        assert process.exitcode is not None, "does not end"
        text = b"".join(iter(lambda: os.read(reader.fileno(), 2**16), b""))
        reader.close()
        heard.close()
        return End(process.exitcode, text.decode(), seconds, wrote)

    def largest_new_file(self) -> int:
        """Bytes of the largest file that was not there before."""
        kept = {(path.relative_to(self._before), path.stat().st_mtime_ns) for path in self._before.rglob("*")}
        sizes = [
            path.stat().st_size
            for path in self.folder.rglob("*")
            if path.is_file() and (path.relative_to(self.folder), path.stat().st_mtime_ns) not in kept
        ]
        return max(sizes)


@pytest.fixture(scope="module", autouse=True)
def _trained(workspace: Workspace) -> None:
    """What some writers need: a run and its logits."""
    common = (f"vit={workspace.backbone}", "exp_name=written", "max_epoch=1", "test_after_fit=False")
    assert command_line(workspace.command(*common)) == 0
    command = workspace.command(f"load_path={workspace.results / TRAINED / 'best.ckpt'}", "bootstrap=0")
    assert command_line([command[0], "robustness", *command[1:]]) == 0


@pytest.fixture(scope="module")
def amid() -> dict[str, int]:
    """Of each writer so far, how many kills left something unfinished."""
    return {}


@pytest.mark.parametrize("name", WRITERS)
def test_a_killed_writer_leaves_the_old_or_the_new(
    name: str, workspace: Workspace, tmp_path: Path, amid: dict[str, int]
) -> None:
    trial, draw = Trial(name, workspace, tmp_path), random.Random(name)
    whole = trial.run()
    assert whole.status == 0 and whole.wrote, whole.said
    new, names = trial.read(), trial.names()
    assert new != trial.old
    amid[name] = 0
    for _ in range(KILLS):
        trial.restore()
        killed = trial.run(kill_after=draw.uniform(0, whole.seconds))
        assert killed.status in (-9, 0), killed.said
        assert trial.read() in (trial.old, new, *trial.writer.between)
        amid[name] += any(path.endswith(".part") for path in trial.names())
        again = trial.run()
        assert again.status == 0, again.said
        assert trial.read() == new
        assert trial.names() == names, "leftovers"


def test_many_of_them_were_writing_when_they_were_killed(amid: dict[str, int]) -> None:
    if amid.keys() != WRITERS.keys():
        pytest.skip("is about the test before, of all writers")
    print(f"kills amid the writing: {amid}, of {KILLS} each")
    assert sum(amid.values()) > KILLS * len(amid) / 4


@pytest.mark.parametrize("name", [name for name, writer in WRITERS.items() if writer.full is not None])
def test_a_full_disk_leaves_the_old_and_says_so(name: str, workspace: Workspace, tmp_path: Path) -> None:
    trial = Trial(name, workspace, tmp_path)
    assert trial.run().status == 0
    room = trial.largest_new_file() // 2
    trial.restore()
    names = trial.names()
    full = trial.run(room=room)
    assert full.status == trial.writer.status, full.said
    assert trial.read() == trial.old
    assert trial.names() == names
    if full.status:
        line = full.said.splitlines()[-1]
        assert re.fullmatch(r"error: .*: File too large; [\d,]+ bytes free.*", line), full.said
        assert trial.writer.full is not None and trial.writer.full in line
        assert "Traceback" not in full.said and ".part" not in line
