"""Environment variables through which SLURM, torchrun or the user say how the processes of a run are started."""

import os

from common.errors import ConfigError

NUMBERS = (
    *("MASTER_PORT", "WORLD_SIZE", "RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK"),
    *("SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_JOB_ID"),
)


def check_launcher() -> None:
    """Checks the variables. Must be called before Lightning, which acts on them, is imported.

    Only srun starts a process for each task. In a SLURM job that was not started by srun, this process is the only
    one; the variables that say otherwise are removed, since Lightning would wait for the others.

    Raises:
        ConfigError: one of them is not a number.
    """
    for name in NUMBERS:
        value = os.environ.get(name)
        if value is not None and not (value.isascii() and value.isdecimal()):
            raise ConfigError(f"{name}: expected a whole number in this environment variable, found {value!r}")
    if int(os.environ.get("MASTER_PORT", "0")) > 65535:
        raise ConfigError(f"MASTER_PORT: expected a port up to 65535, found {os.environ['MASTER_PORT']}")
    if "SLURM_STEP_ID" not in os.environ:
        for name in ("SLURM_NTASKS", "SLURM_PROCID"):
            os.environ.pop(name, None)
