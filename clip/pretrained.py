"""Reads from a Hugging Face folder, the Hugging Face cache or the hub."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError

from common.errors import BackboneError
from common.messages import first_line

T = TypeVar("T")


def read_pretrained(option: str, source: str, read: Callable[[bool], T], what: str) -> T:
    """Calls `read(local_files_only)`, first without the network, and returns its result.

    Args:
        option: the option as the user gave it, `NAME=VALUE`.
        source: a folder, or a name on the hub.
        what: description of what is expected at `source`.

    Raises:
        BackboneError: nothing usable is at `source`.
    """
    is_folder, reasons = Path(source).is_dir(), list[str]()
    for local_files_only in (True,) if is_folder else (True, False):  # the cache may suffice
        try:
            if not local_files_only:
                HfApi().file_exists(source, "config.json")  # fails at once without a network; `read` would retry
            return read(local_files_only)
        except HFValidationError as error:
            raise BackboneError(f"{option}: expected {what}, found no file or folder of that name") from error
        except Exception as error:  # damaged folders raise pickle errors, KeyError and many more
            reasons.append(first_line(error).rstrip("."))
    name = option.partition("=")[0]
    advice = (
        f". {source} is not in the Hugging Face cache, and the hub cannot be reached or does not have it: on a machine "
        f"with a network run `hf download {source}` and copy the folder that it prints to this machine; then set "
        f"{name}=THAT_FOLDER, or put it into the cache that HF_HOME points to"
    )
    said = "; ".join(dict.fromkeys(reasons))
    raise BackboneError(f"{option}: not readable as {what}: {said}{'' if is_folder else advice}")
