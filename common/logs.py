"""What the terminal shows of a command: one line per event, on standard error."""

import logging
import sys
import warnings

from lightning_utilities.core.rank_zero import rank_zero_only

CHATTY = ("pytorch_lightning", "lightning", "lightning_fabric", "transformers", "httpx", "sacred", "fsspec")
NOT_SHOWN = (
    "does not have many workers",
    "your dataloader is not resumable",  # EpochSampler is
    r"module\(s\) in eval mode at the start of training",  # the frozen ones
    "exists and is not empty",  # the run folder, which holds config.json
    r"It is recommended to use `self.log.*sync_dist=True",  # all processes have the same value
    r"`isinstance.treespec, LeafSpec.` is deprecated",
)
"""Warnings of Lightning that do not apply, or are about its own code."""


class _StandardError(logging.StreamHandler):
    """Looks standard error up for each line: a progress bar stands in its place and shows the line above itself."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def set_up_logging() -> None:
    """One line per event on standard error, from the first process only; Lightning's small talk is left out.

    A command that uses Lightning imports it before: it finds out which process this is, and sets its logger's level.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True, handlers=[_StandardError()])
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)
    if getattr(rank_zero_only, "rank", 0):
        logging.disable(logging.INFO)
    for beginning in NOT_SHOWN:
        warnings.filterwarnings("ignore", f".*{beginning}")
