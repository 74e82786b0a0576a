"""Errors that a user can mend. `run.py` and `make_arrow.py` print them without a traceback and exit with status 2."""


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
    """The loss became infinite or not a number; the run stops instead of training on."""


class SweepError(UserError):
    """Runs of a sweep failed, or its folder belongs to another sweep or to one that is still running."""
