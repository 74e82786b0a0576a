"""Writing checkpoints atomically, and telling damaged files from intact ones."""

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
    """Makes Lightning write checkpoints with `write_checkpoint`, in a thread, while training continues.

    Lightning's own plugin writes to the system's temporary folder and copies from there: a kill leaves a partial file.
    Its asynchronous plugin cannot be waited for.
    """

    def __init__(self) -> None:
        self._disk = ThreadPoolExecutor(max_workers=1)
        self._writing: Future[None] | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Starts writing a copy of `checkpoint`; called in the first process only. Raises the same as `finish`."""
        copied = tree_map_only(torch.Tensor, lambda tensor: tensor.detach().to("cpu", copy=True), checkpoint)
        self.finish()
        self._writing = self._disk.submit(write_checkpoint, copied, Path(path))

    def finish(self) -> None:
        """Waits until the checkpoint being written is on disk. Raises OSError if it could not be written."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def teardown(self) -> None:
        """Called by Lightning at the end. If an error is already being raised, one from writing is only logged."""
        ended = sys.exc_info()[0]
        try:
            self.finish()
        except OSError as error:
            if ended is None:
                raise
            log.error("%s", first_line(error))
        finally:
            self._disk.shutdown()  # the interpreter does not join a thread whose start was interrupted by an error
            self._disk = ThreadPoolExecutor(max_workers=1)


def write_checkpoint(content: dict[str, Any], path: Path) -> None:
    """Replaces `path` once everything is on disk. Raises OSError if it cannot be written; `path` is then unchanged."""
    file = io.BytesIO()  # small enough without the frozen weights; torch itself hides why writing to a file failed
    torch.save(content, file)
    with atomic_path(path) as temporary:
        temporary.write_bytes(file.getbuffer())


def check_intact(path: Path) -> None:
    """Raises CheckpointError unless each entry of a checkpoint has the size and checksum recorded in the file.

    torch.load does not verify the checksums.
    """
    try:
        with zipfile.ZipFile(path) as entries:
            damaged = entries.testzip()
    except Exception as error:  # zipfile raises many types on damaged files
        raise CheckpointError(f"{path}: damaged: {first_line(error)}") from error
    if damaged is not None:
        raise CheckpointError(f"{path}: damaged: the checksum of its entry {damaged} is wrong")
