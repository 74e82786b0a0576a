"""Reads samples in worker processes, hands them back in order, and holds only a few at a time."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType

from common.errors import DataError
from vilt.utils.raw_data import BadSampleError, Row, Sample

IN_FLIGHT_PER_WORKER = 4


def read_sample(sample: Sample) -> Row | BadSampleError:
    """The sample's row, or what is wrong with it."""
    try:
        return sample.read()
    except BadSampleError as bad:
        return bad


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; only the parent answers it
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow_parent() -> None:
        parent.join()
        os._exit(1)

    # A parent that is killed outright cannot stop its workers, which would wait for work for ever.
    threading.Thread(target=follow_parent, daemon=True).start()


class OrderedPool:
    """`n_workers` processes that read samples; with 0 they are read in this process."""

    def __init__(self, n_workers: int) -> None:
        self._limit = n_workers * IN_FLIGHT_PER_WORKER
        self._executor: ProcessPoolExecutor | None = None
        if n_workers > 0:
            # spawn: forking a process that has threads (pyarrow, tqdm) may dead-lock, and differs between systems.
            context = multiprocessing.get_context("spawn")
            self._executor = ProcessPoolExecutor(n_workers, mp_context=context, initializer=_start_worker)

    def __enter__(self) -> "OrderedPool":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)

    def read(self, samples: Iterable[tuple[int, Sample]]) -> Iterator[tuple[int, Row | BadSampleError]]:
        """Pairs of row number and result, in the order of `samples`, which is taken only a few samples ahead.

        Raises DataError if a worker process dies.
        """
        if self._executor is None:
            for row, sample in samples:
                yield row, read_sample(sample)
            return
        pending: deque[tuple[int, Sample, Future[Row | BadSampleError]]] = deque()
        try:
            for row, sample in samples:
                if len(pending) == self._limit:
                    yield pending[0][0], pending[0][2].result()
                    pending.popleft()
                pending.append((row, sample, self._executor.submit(read_sample, sample)))
            while pending:
                yield pending[0][0], pending[0][2].result()
                pending.popleft()
        except BrokenProcessPool:
            near = f" near {pending[0][1].name} (row {pending[0][0]})" if pending else ""
            raise DataError(
                f"A worker process died{near}: out of memory, or killed. "
                "Try fewer --workers; --workers 0 reads in the main process and shows where it stops."
            ) from None
