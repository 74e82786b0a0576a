"""How a command ends: exit status, final message on standard error, and traceback in the run folder."""

import re
import sys
import traceback
from pathlib import Path

from common.files import atomic_path
from common.messages import first_line

DONE, OUR_FAULT, USER_ERROR, INTERRUPTED, TERMINATED = 0, 1, 2, 130, 143
"""Exit statuses; the last two follow the shell convention: 128 plus the number of SIGINT or SIGTERM."""
ERROR_FILE = "error.txt"


def end_with_user_error(error: BaseException, folder: Path | None, message: str | None = None) -> int:
    """Prints one line about an error that the user can correct: `message`, or else the error's own text.

    Args:
        folder: the run folder, if the run got as far as creating it.
    """
    message = str(error) if message is None else message
    if message.startswith("Caught "):  # raised in a loader worker: torch puts its traceback into the message
        message = re.split(r"^[\w.]+Error: ", message, flags=re.MULTILINE)[-1].rstrip()
    if isinstance(error, OSError):  # such as a full disk: the training itself is sound and can be resumed
        message += _how_to_resume(folder)
    print(f"error: {message}{_where(_keep_traceback(error, folder))}", file=sys.stderr)
    return USER_ERROR


def end_with_our_fault(error: BaseException, folder: Path | None) -> int:
    """Prints the traceback, and a line that names the error."""
    traceback.print_exception(error)
    name, text = type(error).__name__, first_line(error)
    what = text if text.startswith(name) else f"{name}: {text}"
    where = _where(_keep_traceback(error, folder))
    print(f"internal error: {what}: a fault of this program, not of its input{where}", file=sys.stderr)
    return OUR_FAULT


def end_with_signal(status: int, folder: Path | None) -> int:
    """Prints that the command was interrupted or terminated, and how to resume the run if that is possible."""
    print(f"{'interrupted' if status == INTERRUPTED else 'terminated'}{_how_to_resume(folder)}", file=sys.stderr)
    return status


def _how_to_resume(folder: Path | None) -> str:
    if folder is None or not (folder / "last.ckpt").is_file():
        return ""
    return f"; to resume, repeat the command with resume_from={folder / 'last.ckpt'}"


def _keep_traceback(error: BaseException, folder: Path | None) -> Path | None:
    """Writes the traceback to the run folder; None if there is no folder or it cannot be written."""
    if folder is None:
        return None
    path = folder / ERROR_FILE
    try:
        with atomic_path(path) as temporary:
            temporary.write_text("".join(traceback.format_exception(error)), "utf-8")
    except OSError:  # perhaps for the same reason as `error`
        return None
    return path


def _where(path: Path | None) -> str:
    return f" (traceback in {path})" if path is not None else ""
