"""Errors that a user can correct. run.py and make_arrow.py print them without a traceback and exit with status 2."""

import errno
import os
import shutil
from pathlib import Path

from common.messages import first_line


class UserError(Exception):
    """Base of all errors whose cause lies in what the user gave: options, files, weights."""


class ConfigError(UserError):
    """An option is unknown, of the wrong type, out of range, or contradicts another one."""


class DataError(UserError):
    """A raw dataset, an arrow file or a missing table is absent, damaged or does not fit."""


class BackboneError(UserError):
    """CLIP weights or their tokenizer cannot be found, read or used."""


class CheckpointError(UserError):
    """A checkpoint cannot be read, or belongs to another model, task or backbone."""


class NonFiniteLossError(UserError):
    """The loss or a gradient became infinite or not a number; the run stops instead of training on."""


class SweepError(UserError):
    """Runs of a sweep failed, or its folder belongs to another sweep."""


class BusyError(UserError):
    """Another process is at the same work."""


class CheckupError(UserError):
    """`run.py doctor` found, and printed, what would end a run."""


class MachineError(UserError):
    """The machine refuses: a disk is full, a folder may not be written, too many files are open, no memory is left."""


class OtherProcessError(Exception):
    """Another process of the run is gone; `status` is the exit status for this one."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""A full disk, a used-up quota, a limit on the size of files."""
OF_THE_MACHINE = {
    *NO_SPACE,
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EMFILE, errno.ENFILE, errno.EIO, errno.ESTALE),
    *(errno.ENOTDIR, errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG),  # a file where a folder is to be, and the like
}
"""What an OSError can be about without any fault of the program's; others, such as a file that is not there, it should
have looked for itself."""


def machine_error(error: Exception, folder: Path | None = None) -> MachineError | None:
    """`error` as one that the user can correct, if it is: the file, and what the system says of it, or a full GPU.

    Args:
        folder: where it was, in case the system names no file, as of a write to an open one.
    """
    if type(error).__name__ == "OutOfMemoryError":  # torch's
        return MachineError(f"{first_line(error)} A smaller per_gpu_batchsize needs less.")
    if not isinstance(error, OSError) or error.errno not in OF_THE_MACHINE:
        return None
    if error.filename is None and folder is not None:
        error.filename = str(folder)
    at = f"{error.filename}: " if error.filename is not None else ""
    return MachineError(f"{at}{reason_of(error)}")


def reason_of(error: OSError) -> str:
    """What the system says of a file that it cannot write; where room is lacking, also how much there is."""
    if error.errno not in NO_SPACE:
        return error.strerror or str(error)
    free = ""
    if error.filename is not None:
        folder = next(folder for folder in Path(error.filename).absolute().parents if folder.exists())
        free = f"; {shutil.disk_usage(folder).free:,} bytes free"
    return f"{os.strerror(error.errno)}{free}"
