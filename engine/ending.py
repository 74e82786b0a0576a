"""How a command ends: its exit status, its last words on standard error, and the traceback in the run folder."""

import re
import sys
import traceback
from pathlib import Path

from common.files import atomic_path
from common.messages import first_line

DONE, OUR_FAULT, USER_ERROR, INTERRUPTED, TERMINATED = 0, 1, 2, 130, 143
"""Exit statuses; the last two as shells have it: 128 and the number of SIGINT or SIGTERM."""
ERROR_FILE = "error.txt"


def end_with_user_error(error: BaseException, folder: Path | None, message: str | None = None) -> int:
    """One line about what the user can correct; `message`, or else the error's own text.

    Args:
        folder: that of the run, if it came so far.
    """
    message = str(error) if message is None else message
    if message.startswith("Caught "):  # in a loader process: torch puts its traceback into the message
        message = re.split(r"^[\w.]+Error: ", message, flags=re.MULTILINE)[-1].rstrip()
    if isinstance(error, OSError):  # a full disk, say: the training is not at fault
        message += _how_to_resume(folder)
    print(f"error: {message}{_where(_keep_traceback(error, folder))}", file=sys.stderr)
    return USER_ERROR


def end_with_our_fault(error: BaseException, folder: Path | None) -> int:
    """The traceback, and a line that says what it was."""
    traceback.print_exception(error)
    name, text = type(error).__name__, first_line(error)
    what = text if text.startswith(name) else f"{name}: {text}"
    where = _where(_keep_traceback(error, folder))
    print(f"internal error: {what}: a fault of this program, not of what it was given{where}", file=sys.stderr)
    return OUR_FAULT


def end_with_signal(status: int, folder: Path | None) -> int:
    """A line that says so, and how to resume the run, where that is possible."""
    print(f"{'interrupted' if status == INTERRUPTED else 'terminated'}{_how_to_resume(folder)}", file=sys.stderr)
    return status


def _how_to_resume(folder: Path | None) -> str:
    if folder is None or not (folder / "last.ckpt").is_file():
        return ""
    return f"; to resume, repeat the command with resume_from={folder / 'last.ckpt'}"


def _keep_traceback(error: BaseException, folder: Path | None) -> Path | None:
    """Writes `error` to the run folder; None where there is none, or it cannot be written."""
    if folder is None:
        return None
    path = folder / ERROR_FILE
    try:
        with atomic_path(path) as temporary:
            temporary.write_text("".join(traceback.format_exception(error)), "utf-8")
    except OSError:  # perhaps the very reason for `error`
        return None
    return path


def _where(path: Path | None) -> str:
    return f" (traceback in {path})" if path is not None else ""
