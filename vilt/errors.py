"""Errors that a user can mend. `run.py` and `make_arrow.py` print them without a traceback and exit with status 2."""

import errno


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
    """Runs of a sweep failed, or its folder belongs to another sweep or to one that is still running."""


class StorageError(UserError):
    """A file cannot be written: the disk is full, or a limit on space or file size is reached."""


class CheckupError(UserError):
    """`run.py doctor` found what would end a run; it has said what."""


class MachineError(UserError):
    """The machine refuses: a disk is full, a folder may not be written, too many files are open, no memory is left."""


OF_THE_MACHINE = frozenset(
    (
        errno.ENOSPC,  # disk full
        errno.EDQUOT,
        errno.EFBIG,  # a limit on the size of files
        errno.EACCES,
        errno.EPERM,
        errno.EROFS,
        errno.EMFILE,
        errno.ENFILE,
        errno.EIO,
        errno.ESTALE,
        errno.ENOTDIR,  # a file where a folder is to be
        errno.EEXIST,
        errno.ELOOP,
        errno.ENAMETOOLONG,
    )
)
"""What an OSError can be about without any fault of the program's; others, such as a file that is not there, it should
have looked for itself."""


def machine_error(error: OSError) -> MachineError | None:
    """`error` as one that the user can mend, if it is: the file, and what the system says of it."""
    if error.errno not in OF_THE_MACHINE:
        return None
    at = f"{error.filename}: " if error.filename is not None else ""
    return MachineError(f"{at}{error.strerror}")
