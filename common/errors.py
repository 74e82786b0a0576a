"""Errors that the user can fix. run.py and make_arrow.py print them without a traceback and exit with status 2."""

import errno
import os
import shutil
from pathlib import Path

from common.messages import first_line


class UserError(Exception):
    """Base of all errors caused by what the user provided: options, files, weights."""


class ConfigError(UserError):
    """An option is unknown, has the wrong type, is out of range, or contradicts another one."""


class DataError(UserError):
    """A raw dataset, an arrow file or a missing table is absent or damaged, or does not fit."""


class BackboneError(UserError):
    """CLIP's weights or tokenizer cannot be found, read or used."""


class CheckpointError(UserError):
    """A checkpoint cannot be read, or belongs to another model, task or backbone."""


class NonFiniteLossError(UserError):
    """The loss or a gradient became infinite or NaN; the run stops instead of training on."""


class SweepError(UserError):
    """Runs of a sweep failed, or its folder belongs to another sweep."""


class BusyError(UserError):
    """Another process is already doing the same work."""


class CheckupError(UserError):
    """`run.py doctor` found, and printed, a problem that would end a run."""


class MachineError(UserError):
    """The machine refuses: disk full, folder not writable, too many open files, out of memory."""


class OtherProcessError(Exception):
    """Another process of the run has died; `status` is the exit status for this one."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""A full disk, an exhausted quota, or the file size limit."""
MACHINE_ERRNOS = {
    *NO_SPACE,
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EMFILE, errno.ENFILE, errno.EIO, errno.ESTALE),
    *(errno.ENOTDIR, errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG),  # a file where a folder should be, and the like
}
"""Codes of OSErrors that are not the program's fault. The program should have checked for all others, such as a missing
file."""


def machine_error(error: Exception, folder: Path | None = None) -> MachineError | None:
    """`error` as a MachineError if the user can fix it (a refused file, a full GPU), else None.

    Args:
        folder: named in the message if the system names no file, as for a write to an open file.
    """
    if type(error).__name__ == "OutOfMemoryError":  # torch's
        return MachineError(f"{first_line(error)} Try a smaller per_gpu_batchsize.")
    if not isinstance(error, OSError) or error.errno not in MACHINE_ERRNOS:
        return None
    if error.filename is None and folder is not None:
        error.filename = str(folder)
    at = f"{error.filename}: " if error.filename is not None else ""
    return MachineError(f"{at}{reason_of(error)}")


def reason_of(error: OSError) -> str:
    """The system's reason for `error`; if there is no space left, also how many bytes are free."""
    if error.errno not in NO_SPACE:
        return error.strerror or str(error)
    free = ""
    if error.filename is not None:
        folder = next(folder for folder in Path(error.filename).absolute().parents if folder.exists())
        free = f"; {shutil.disk_usage(folder).free:,} bytes free"
    return f"{os.strerror(error.errno)}{free}"
