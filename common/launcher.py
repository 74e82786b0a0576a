"""Variables by which SLURM, torchrun or the user say how the processes of a run are started."""

import os

from common.errors import ConfigError

NUMBERS = (
    *("MASTER_PORT", "WORLD_SIZE", "RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK"),
    *("SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_JOB_ID"),
)


def check_launcher() -> None:
    """Checks the variables. To be called before Lightning is imported, which acts on them.

    In a job of SLURM, but not started by srun, which alone starts a process for each task, this one is the only one:
    then the variables that say otherwise are removed, since Lightning would wait for the others.

    Raises:
        ConfigError: one is no number.
    """
    for name in NUMBERS:
        value = os.environ.get(name)
        if value is not None and not (value.isascii() and value.isdecimal()):
            raise ConfigError(f"{name}: expected a whole number in this variable of the environment, found {value!r}")
    if int(os.environ.get("MASTER_PORT", "0")) > 65535:
        raise ConfigError(f"MASTER_PORT: expected a port up to 65535, found {os.environ['MASTER_PORT']}")
    if "SLURM_STEP_ID" not in os.environ:
        for name in ("SLURM_NTASKS", "SLURM_PROCID"):
            os.environ.pop(name, None)
