"""Reading from a Hugging Face folder, the Hugging Face cache, or the hub."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError

from common.errors import BackboneError
from common.messages import first_line

T = TypeVar("T")


def read_pretrained(option: str, source: str, read: Callable[[bool], T], what: str) -> T:
    """What `read(local_files_only)` gives.

    Args:
        option: as the user gave it, `NAME=VALUE`.
        source: a folder, or a name on the hub.
        what: what is expected there.

    Raises:
        BackboneError: nothing usable is there.
    """
    is_folder, reasons = Path(source).is_dir(), list[str]()
    for local_files_only in (True,) if is_folder else (True, False):  # the cache first: no network where it suffices
        try:
            if not local_files_only:
                HfApi().file_exists(source, "config.json")  # fails at once without a network; `read` would retry
            return read(local_files_only)
        except HFValidationError as error:
            raise BackboneError(f"{option}: expected {what}, found no file or folder of that name") from error
        except Exception as error:  # on damaged folders: pickle's, ImportError, KeyError, and classes of its own
            reasons.append(first_line(error).rstrip("."))
    name = option.partition("=")[0]
    advice = (
        f". {source} is neither in the Hugging Face cache nor within reach on the hub: on a machine with network run "
        f"`hf download {source}` and copy the folder that it names here; then give {name}=THAT_FOLDER, or put it into "
        f"the cache that HF_HOME names"
    )
    said = "; ".join(dict.fromkeys(reasons))
    raise BackboneError(f"{option}: not readable as {what}: {said}{'' if is_folder else advice}")
