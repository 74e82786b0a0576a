"""A run that is killed and resumed, however often and wherever, ends bitwise equal to an uninterrupted one."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from common.signals import Stopped, stopping_on_signals
from run import command_line
from tests.conftest import LONG, Captured, Workspace
from tests.interrupted import Chain, differences
from vilt.datasets.kinds import ImageKind

ROOT = Path(__file__).parents[1]
PLACES = ("accumulation", "optimiser step", "validation", "before the checkpoint", "checkpoint", "epoch end", "test")
KILLED, TERMINATED, INTERRUPTED = signal.SIGKILL, signal.SIGTERM, signal.SIGINT


@pytest.fixture(scope="module")
def whole(workspace: Workspace) -> Chain:
    """An uninterrupted run."""
    chain = Chain(workspace, "uninterrupted")
    assert chain.run() == 0, chain.log.read_text()
    return chain


def assert_same(chain: Chain, whole: Chain) -> None:
    found = differences(chain.result(), whole.result())
    assert not found, (found[:5], chain.log.read_text()[-3000:] if chain.log.is_file() else "")


def test_a_run_killed_three_times_ends_bitwise_equal(workspace: Workspace, whole: Chain) -> None:
    chain = Chain(workspace, "killed")
    for place, passes in (("accumulation", 9), ("checkpoint", 3), ("validation", 3)):
        assert chain.run((place, passes, KILLED)) == -KILLED, chain.log.read_text()
    assert chain.run() == 0, chain.log.read_text()
    assert_same(chain, whole)


def test_sigterm_saves_a_checkpoint_first(workspace: Workspace, whole: Chain) -> None:
    """No step is lost: each run stops where the signal arrived, and the next one continues there."""
    chain = Chain(workspace, "terminated")
    for place, passes, step in (("accumulation", 3, 3), ("validation", 1, 4), ("test", 1, 18)):
        assert chain.run((place, passes, TERMINATED)) == 143, chain.log.read_text()
        newest = [folder / "last.ckpt" for folder in chain.folders if (folder / "last.ckpt").is_file()][-1]
        assert torch.load(newest, weights_only=True)["global_step"] == step, place
    assert chain.run() == 0, chain.log.read_text()
    assert_same(chain, whole)


@pytest.mark.parametrize("steps", [pytest.param(3, id="between validations", marks=LONG), 4])
def test_validation_or_test_interrupted_after_max_steps_is_repeated(workspace: Workspace, steps: int) -> None:
    """Each validation has two batches; it runs at steps 2 and 4, and at step 3 only because of the limit."""
    once = Chain(workspace, f"limited_{steps}", f"max_steps={steps}")
    assert once.run() == 0, once.log.read_text()
    tested = Chain(workspace, f"limited_in_test_{steps}", f"max_steps={steps}")
    assert tested.run(("test", 1, TERMINATED)) == 143, tested.log.read_text()
    assert tested.run() == 0, tested.log.read_text()
    assert {step for step, name in tested.metrics() if name.startswith("test/")} == {steps}
    assert_same(tested, once)
    ended = Chain(workspace, f"limited_at_its_end_{steps}", f"max_steps={steps}")
    assert ended.run(("epoch end", 1, KILLED)) == -KILLED, ended.log.read_text()
    assert ended.run() == 0, ended.log.read_text()
    assert_same(ended, once)
    chain = Chain(workspace, f"limited_in_validation_{steps}", f"max_steps={steps}")
    assert chain.run(("validation", 3, TERMINATED)) == 143, chain.log.read_text()
    last = torch.load(chain.folders[0] / "last.ckpt", weights_only=True)
    assert last["global_step"] == steps
    assert chain.run() == 0, chain.log.read_text()
    assert_same(chain, once)


def test_one_of_two_runs_started_together_is_refused(workspace: Workspace, whole: Chain) -> None:
    """After a kill, the lock is free, so that one of the two can run."""
    pair = [Chain(workspace, "together"), Chain(workspace, "together")]
    pair[1].log = pair[1].log.with_name("together_too.log")
    assert pair[0].run(("accumulation", 3, KILLED)) == -KILLED
    processes = [chain.started() for chain in pair]
    for process in processes:
        process.join(120)
    at_work, refused = sorted(zip(processes, pair, strict=True), key=lambda one: one[0].exitcode or 0)
    assert [at_work[0].exitcode, refused[0].exitcode] == [0, 2], [chain.log.read_text() for chain in pair]
    assert refused[1].log.read_text().splitlines()[-1] == (
        f"error: resume_from=auto: another process runs this training in {pair[0].parent} "
        f"(process {at_work[0].pid} on {socket.gethostname()})"
    )
    assert len(pair[0].folders) == 2, "one of the killed run and one more"
    assert_same(pair[0], whole)
    assert pair[1].run() == 0, "nothing left to do"
    assert not list(pair[0].parent.glob(".*"))


def test_a_second_signal_stops_at_once(workspace: Workspace) -> None:
    """The first signal arrives during accumulation; without the second, a checkpoint would follow the step."""
    chain = Chain(workspace, "two_signals", "batch_size=24")
    assert chain.run(("accumulation", 1, TERMINATED), ("before the optimiser", 1, INTERRUPTED)) == 130
    assert "a second signal stops at once" in chain.log.read_text()
    assert not list(chain.folders[0].glob("*.ckpt"))


def test_a_stop_is_no_error_even_if_cleaning_up_fails() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(Stopped) as stopped, stopping_on_signals():
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            raise RuntimeError("half set up, cannot be cleaned up")
    assert stopped.value.code == 130
    with pytest.raises(ZeroDivisionError), stopping_on_signals():
        print(1 / 0)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_ctrl_c_to_the_process_group_still_saves_a_checkpoint(workspace: Workspace, whole: Chain) -> None:
    """The loader workers keep delivering the batches that the run needs until then."""
    chain = Chain(workspace, "group")
    assert chain.run(("accumulation", 8, INTERRUPTED), group=True) == 130, chain.log.read_text()
    assert (chain.folders[0] / "last.ckpt").is_file()
    assert chain.run() == 0
    assert_same(chain, whole)


@pytest.mark.parametrize("resumed", [False, True])
def test_the_error_for_a_dead_loader_worker_names_its_sample(workspace, monkeypatch, capsys, resumed):
    options = ["missing_ratio=0.0", "num_workers=2", "test_after_fit=False"]
    if resumed:
        folder = workspace.train("before_it_dies", *options, "max_steps=1")
        options.append(f"resume_from={folder / 'last.ckpt'}")
    image = ImageKind._decoded

    def die(self: ImageKind, row: int) -> torch.Tensor:
        if self.data.path.name == "mmimdb_train.arrow" and row == 17:
            os.kill(os.getpid(), signal.SIGKILL)
        return image(self, row)

    monkeypatch.setattr(ImageKind, "_decoded", die)
    assert command_line(workspace.command(f"vit={workspace.backbone}", *options, "exp_name=dies")) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    name = pa.ipc.open_file(workspace.arrow / "mmimdb_train.arrow").read_all()["image_id"][17]
    assert error.startswith(f"error: {workspace.arrow / 'mmimdb_train.arrow'}: sample {name}: the loader worker")
    assert "is killed by signal" in error or "exited unexpectedly" in error  # depends on how torch notices


def test_a_slurm_job_is_requeued_and_resumes(workspace: Workspace, whole: Chain, tmp_path: Path) -> None:
    """Runs slurm.sh with a fake srun that runs its arguments, and a fake scontrol that records its own."""
    programs = {"srun": 'exec "$@"', "scontrol": f'echo "$@" >> {tmp_path}/requeued'}
    for name, line in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    chain = Chain(workspace, "slurm")
    options = [option for option in chain.command[2:] if option != "resume_from=auto"]
    slurm = {"SLURM_JOB_ID": "4711", "SLURM_NTASKS": "1", "SLURM_JOB_NAME": "rep", "SLURM_PROCID": "0"}
    slurm |= {"SLURM_STEP_ID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NTASKS_PER_NODE": "1"}
    environment = {**os.environ, **slurm, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": sys.executable}
    environment["OMP_NUM_THREADS"] = "1"

    command = ["bash", str(ROOT / "slurm.sh"), *options]
    job = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    assert job.stderr is not None
    for line in job.stderr:
        if line.startswith("epoch 0, step 2:"):
            # SLURM signals the task, not the script; the task is the only child of the script's shell.
            os.kill(int(Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()[0]), signal.SIGTERM)
    assert job.wait(60) == 143
    assert (tmp_path / "requeued").read_text() == "requeue 4711\n"
    assert not list(workspace.results.rglob("hpc_ckpt*"))
    assert chain.run() == 0
    assert "resumes from" in chain.log.read_text()
    assert_same(chain, whole)


# `make test-long`


@LONG
@pytest.mark.parametrize("number", [KILLED, TERMINATED, INTERRUPTED])
@pytest.mark.parametrize("place", PLACES)
def test_a_run_interrupted_anywhere_ends_bitwise_equal(
    workspace: Workspace, whole: Chain, place: str, number: int
) -> None:
    """Interrupts at the first, third and fifth pass of each place; if a pass never comes, the run simply finishes."""
    chain = Chain(workspace, f"{place.replace(' ', '_')}_{number}")
    statuses = [chain.run((place, passes, number)) for passes in (1, 3, 5)]
    assert statuses[0] in (-KILLED, 128 + number), chain.log.read_text()
    assert set(statuses) <= {-KILLED, 128 + number, 0}
    assert chain.run() == 0
    assert_same(chain, whole)


@LONG
@pytest.mark.parametrize("place", ["epoch 0, step 2:", "epoch 0: "])
def test_two_processes_stop_together(workspace: Workspace, place: str) -> None:
    """Only the first gets the signal; both stop at the same step, and the run resumes as if never stopped."""
    chains = [Chain(workspace, f"pair_{number}_{len(place)}", "cpu_processes=2", "batch_size=16") for number in (0, 1)]
    for chain, stopped in zip(chains, (True, False), strict=True):
        statuses: list[int] = []
        while not statuses or statuses[-1] == 143:
            job = subprocess.Popen([sys.executable, *chain.command], cwd=ROOT, stderr=subprocess.PIPE, text=True)
            assert job.stderr is not None
            for line in job.stderr:
                if line.startswith(place) and stopped and not statuses:
                    os.kill(job.pid, signal.SIGTERM)
            statuses.append(job.wait(120))
        assert statuses == ([143, 0] if stopped else [0])
    assert_same(chains[0], chains[1])


STEPS = 2_000
GROWTH = 8 * 2**20
"""Most bytes that the main process and each loader worker may grow by in the last three quarters of the run."""


def anonymous(pid: int) -> int:
    """Bytes of the process's resident anonymous memory."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return 1024 * int(found[1]) if found else 0


def children(pid: int) -> list[int]:
    return [
        int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
    ]


@LONG
def test_memory_does_not_grow(workspace: Workspace, capsys: Captured) -> None:
    chain = Chain(workspace, "long", "num_workers=2", "max_epoch=10000", f"max_steps={STEPS}", "val_check_interval=1.0")
    process, memory = chain.started(), dict[int, list[int]]()
    assert process.pid is not None
    while process.exitcode is None:
        process.join(0.5)
        try:
            for pid in (process.pid, *children(process.pid)):
                memory.setdefault(pid, []).append(anonymous(pid))
        except OSError:  # the process has just ended
            continue
        time.sleep(0.5)
    assert process.exitcode == 0, chain.log.read_text()[-3000:]
    longest = max(map(len, memory.values()))
    for pid, sizes in memory.items():
        if len(sizes) > longest / 2:  # leaves out the workers of the final test
            early, late = max(sizes[len(sizes) // 8 : len(sizes) // 4]), max(sizes[-len(sizes) // 8 :])
            with capsys.disabled():
                who = "main process" if pid == process.pid else "loader worker"
                print(f"\n{who}: {early / 2**20:.1f} MB, at the end of {STEPS} steps {late / 2**20:.1f} MB")
            assert late < early + GROWTH
