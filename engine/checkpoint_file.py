"""Writing checkpoints so that a reader finds the old file or the new one, and telling a damaged one from an intact."""

import io
import logging
import sys
import zipfile
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO
from torch.utils._pytree import tree_map_only

from common.errors import CheckpointError
from common.files import atomic_path
from common.messages import first_line

log = logging.getLogger("rep")


class AtomicCheckpointIO(TorchCheckpointIO):
    """How Lightning writes checkpoints: with `write_checkpoint`, while the training goes on.

    Its own way writes into the system's folder for temporary files and copies from there: a kill leaves a part. Its own
    way in a thread cannot be waited for.
    """

    def __init__(self) -> None:
        self._disk = ThreadPoolExecutor(max_workers=1)
        self._writing: Future[None] | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Begins to write what the checkpoint holds now; in the first process alone. Raises what `finish` does."""
        now = tree_map_only(torch.Tensor, lambda tensor: tensor.detach().to("cpu", copy=True), checkpoint)
        self.finish()
        self._writing = self._disk.submit(write_checkpoint, now, Path(path))

    def finish(self) -> None:
        """Waits until what was begun is on the disk. Raises OSError where it could not be written."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def teardown(self) -> None:
        """Called by Lightning at the end, whose error, if it has one, is the one to be raised."""
        ended = sys.exc_info()[0]
        try:
            self.finish()
        except OSError as error:
            if ended is None:
                raise
            log.error("%s", first_line(error))
        finally:
            self._disk.shutdown()  # a thread whose start an error interrupted is unknown to the interpreter's exit
            self._disk = ThreadPoolExecutor(max_workers=1)


def write_checkpoint(content: dict[str, Any], path: Path) -> None:
    """Replaces `path` once all is on the disk. Raises OSError where it cannot be written; `path` is as it was then."""
    file = io.BytesIO()  # checkpoints lack the frozen weights; and torch hides why writing to a file failed
    torch.save(content, file)
    with atomic_path(path) as temporary:
        temporary.write_bytes(file.getbuffer())


def check_intact(path: Path) -> None:
    """Raises CheckpointError unless each entry of a checkpoint has the size and the checksum that the file records.

    torch.load does not look at the checksums.
    """
    try:
        with zipfile.ZipFile(path) as entries:
            damaged = entries.testzip()
    except Exception as error:  # zipfile raises many types on damaged files
        raise CheckpointError(f"{path}: damaged: {first_line(error)}") from error
    if damaged is not None:
        raise CheckpointError(f"{path}: damaged: the checksum of its entry {damaged} is wrong")
