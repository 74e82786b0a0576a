"""A line for each run that ends, with its time and an estimate of what is left."""

import logging
import time

from sweep.jobs import Job, Outcome

log = logging.getLogger("rep")


class Progress:
    """Counts the runs that end, and remembers those that failed.

    Args:
        total: runs of the whole sweep.
        complete: runs that were complete before this one started.
    """

    def __init__(self, total: int, complete: int) -> None:
        self.total = total
        self.done = complete
        self.ended = 0
        self.failed: list[tuple[Job, str]] = []
        self._began = time.monotonic()

    def tell(self, job: Job, outcome: Outcome, words: str) -> None:
        """Says that `job` ended, and with what; `words` are its result."""
        self.ended += 1
        if outcome.error is None:
            self.done += 1
        else:
            self.failed.append((job, outcome.error))
            words = f"failed: {outcome.error}"
        left = self.total - self.done - len(self.failed)
        per_run = (time.monotonic() - self._began) / self.ended
        rest = f"; about {duration(left * per_run)} left" if left else ""
        place = self.done + len(self.failed)
        log.info("[%d/%d] %s: %s (%s%s)", place, self.total, job.name, words, duration(outcome.seconds), rest)

    def failures(self) -> str:
        """The runs that failed, each with its last error and its log, as text."""
        return "\n".join(f"  {job.name}: {error}\n    {job.log}" for job, error in self.failed)


def duration(seconds: float) -> str:
    """A time for the eye: `8 s`, `12 min`, `3 h 20 min`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
