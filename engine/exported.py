"""A trained model as a folder in Hugging Face's layout: `model.safetensors`, `config.json` and a model card.

`load_path` and `load_model` read it like a checkpoint; `huggingface_hub` can upload it unchanged.
"""

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import CheckpointError, ConfigError
from common.files import new_folder
from common.messages import first_line
from common.strict_json import read_json, write_json

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
DESCRIPTION = "rep"
"""Key of the model's description in a checkpoint and in config.json; also config.json's `model_type`."""


def is_exported(folder: Path) -> bool:
    """Whether `folder` holds an exported model."""
    return (folder / WEIGHTS).is_file() and (folder / CONFIG).is_file()


def weights_file(path: Path) -> Path:
    """The file of a checkpoint; for an exported model, which is a folder, its file of weights."""
    return path / WEIGHTS if is_exported(path) else path


def read_exported(weights: Path) -> dict[str, Any]:
    """The state dict and the description (under DESCRIPTION) of the checkpoint that was exported.

    Raises:
        CheckpointError: it is damaged, or not an exported model.
    """
    from safetensors.torch import load_file  # here, since the table of runs uses the names above without loading torch

    try:
        config = read_json(weights.with_name(CONFIG))
        if config.get("model_type") != DESCRIPTION:
            raise ValueError(
                f"{weights.with_name(CONFIG)}: expected model_type {DESCRIPTION}, as `run.py export` writes it"
            )
        return {"state_dict": load_file(weights), DESCRIPTION: config[DESCRIPTION]}
    except Exception as error:  # safetensors has error types of its own for damaged files
        raise CheckpointError(f"{weights}: not readable as an exported model: {first_line(error)}") from error


def write_exported(out: Path, state: "dict[str, Tensor]", described: dict[str, Any], card: str) -> None:
    """Exports a model to the folder `out`, completely or not at all.

    Raises:
        ConfigError: the folder exists already.
    """
    from safetensors.torch import save

    if out.exists():
        raise ConfigError(f"out={out}: expected a folder that does not exist yet, found one that does")
    with new_folder(out) as folder:
        tensors = {name: tensor.contiguous() for name, tensor in state.items()}
        (folder / WEIGHTS).write_bytes(save(tensors, {"format": "pt"}))
        write_json(folder / CONFIG, {"model_type": DESCRIPTION, DESCRIPTION: described})
        (folder / CARD).write_text(card, "utf-8")


def shared_name(name: str, out: Path) -> str:
    """The name of a file or folder for an export to `out`, without the user's folders: an absolute path becomes one
    relative to the deepest folder above both, where `resolve_path` finds it, or its last part if that is far up."""
    path, folder = Path(name), out.resolve()
    if not path.is_absolute():
        return name
    above = next(each for each in folder.parents if each in path.parents)
    return path.name if above in (Path(path.anchor), Path.home().parent) else path.relative_to(above).as_posix()


def resolve_path(name: str, checkpoint: Path) -> str:
    """Resolves a path as a run named it, if it was relative to a folder above the run's checkpoint."""
    with suppress(OSError):  # a folder that may not be entered, or an invalid file name
        places = [Path(name), *(folder / name for folder in checkpoint.resolve().parents)]
        return next((str(place) for place in places if place.is_file() or (place / CONFIG).is_file()), name)
    return name
