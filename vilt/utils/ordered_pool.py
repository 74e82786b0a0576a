"""Reads samples in worker processes and returns them in order, a few at a time."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from common.errors import DataError
from vilt.utils.raw_data import BadSampleError, Row, Sample

IN_FLIGHT_PER_WORKER = 4
Result = Row | BadSampleError


def read_sample(sample: Sample) -> Result:
    """The sample's row, or what is wrong with it."""
    try:
        return sample.read()
    except BadSampleError as bad:
        return bad


def read_in_order(samples: Iterable[Sample], n_workers: int) -> Generator[tuple[int, Result], None, None]:
    """Pairs of row number and result, in the order of `samples`, of which only a few are taken at a time.

    Args:
        n_workers: number of processes; 0 reads in this process.

    Raises:
        DataError: a worker process died.
    """
    if n_workers == 0:
        yield from ((sample.row, read_sample(sample)) for sample in samples)
        return
    # spawn: forking a process that has threads (pyarrow, tqdm) may dead-lock, and differs between systems.
    pool = ProcessPoolExecutor(n_workers, multiprocessing.get_context("spawn"), _start_worker)
    pending: deque[tuple[Sample, Future[Result]]] = deque()
    try:
        for sample in samples:
            pending.append((sample, pool.submit(read_sample, sample)))
            if len(pending) > n_workers * IN_FLIGHT_PER_WORKER:
                yield pending[0][0].row, pending[0][1].result()
                pending.popleft()
        while pending:
            yield pending[0][0].row, pending[0][1].result()
            pending.popleft()
    except BrokenProcessPool:
        near = f" near {pending[0][0].name} (row {pending[0][0].row})" if pending else ""
        raise DataError(
            f"A worker process died{near}: out of memory, or killed. "
            "Try fewer --workers; --workers 0 reads in the main process and shows where it stops."
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; only the parent answers it
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow_parent() -> None:
        parent.join()
        os._exit(1)

    # A parent that is killed outright cannot stop its workers, which would wait for work for ever.
    threading.Thread(target=follow_parent, daemon=True).start()
