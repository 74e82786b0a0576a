"""SLURM's variables where they say nothing about this process."""

import os


def ignore_without_srun() -> None:
    """In a job, but not started by srun, which alone starts a process for each task: this one is the only one.

    Lightning would wait for the others. To be called before it is imported.
    """
    if "SLURM_STEP_ID" not in os.environ:
        for name in ("SLURM_NTASKS", "SLURM_PROCID"):
            os.environ.pop(name, None)
