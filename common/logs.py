"""Logging to the terminal: one line per event, on standard error."""

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from lightning_utilities.core.rank_zero import rank_zero_only

CHATTY = ("pytorch_lightning", "lightning", "lightning_fabric", "transformers", "httpx", "sacred", "fsspec")
NOT_SHOWN = (
    "does not have many workers",
    "your dataloader is not resumable",  # EpochSampler is
    r"module\(s\) in eval mode at the start of training",  # the frozen ones
    "exists and is not empty",  # the run folder, which holds config.json
    r"It is recommended to use `self.log.*sync_dist=True",  # the value is the same in all processes
    r"`isinstance.treespec, LeafSpec.` is deprecated",
)
"""Patterns of Lightning's warnings that do not apply here, or concern its own code."""


class _StandardError(logging.StreamHandler):
    """Looks up standard error for each line: a progress bar may have replaced it, to show the line above itself."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


@contextmanager
def without_repeats(logger: logging.Logger) -> Iterator[None]:
    """Leaves out a line that says the same as the last one of its kind, such as the precision of each of many runs."""
    last: dict[str, object] = {}

    def is_new(record: logging.LogRecord) -> bool:
        repeats = record.msg in last and last[record.msg] == record.args
        last[record.msg] = record.args
        return not repeats

    logger.addFilter(is_new)
    try:
        yield
    finally:
        logger.removeFilter(is_new)


def set_up_logging() -> None:
    """Logs one line per event on standard error, from the first process only, without Lightning's chatter.

    A command that uses Lightning must import it first: the import finds out which process this is, and sets the level
    of Lightning's logger.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True, handlers=[_StandardError()])
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)
    if getattr(rank_zero_only, "rank", 0):
        logging.disable(logging.INFO)
    for beginning in NOT_SHOWN:
        warnings.filterwarnings("ignore", f".*{beginning}")
