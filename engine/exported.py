"""A trained model as a folder in Hugging Face's layout: `model.safetensors`, `config.json` and a model card.

`load_path` and `load_model` read it like a checkpoint; `huggingface_hub` uploads it as it is.
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
"""Key of a checkpoint, and of config.json, under which it says what it is; also the `model_type` there."""


def is_exported(folder: Path) -> bool:
    """Whether `folder` holds an exported model."""
    return (folder / WEIGHTS).is_file() and (folder / CONFIG).is_file()


def weights_file(path: Path) -> Path:
    """The file of a checkpoint: of an exported model, which is a folder, that of its weights."""
    return path / WEIGHTS if is_exported(path) else path


def read_exported(weights: Path) -> dict[str, Any]:
    """What the checkpoint that was exported held: its entries, and what it said of its model under DESCRIPTION.

    Raises:
        CheckpointError: it is damaged, or of another kind.
    """
    from safetensors.torch import load_file  # here, as the table of runs needs the names above without torch

    try:
        config = read_json(weights.with_name(CONFIG))
        if config.get("model_type") != DESCRIPTION:
            raise ValueError(
                f"{weights.with_name(CONFIG)}: expected model_type {DESCRIPTION}, as `run.py export` writes it"
            )
        return {"state_dict": load_file(weights), DESCRIPTION: config[DESCRIPTION]}
    except Exception as error:  # safetensors raises its own on damaged files
        raise CheckpointError(f"{weights}: not readable as an exported model: {first_line(error)}") from error


def write_exported(out: Path, state: "dict[str, Tensor]", described: dict[str, Any], card: str) -> None:
    """Writes the folder, completely or not at all.

    Raises:
        ConfigError: it is there already.
    """
    from safetensors.torch import save

    if out.exists():
        raise ConfigError(f"out={out}: expected a folder that is not there yet")
    with new_folder(out) as folder:
        tensors = {name: tensor.contiguous() for name, tensor in state.items()}
        (folder / WEIGHTS).write_bytes(save(tensors, {"format": "pt"}))
        write_json(folder / CONFIG, {"model_type": DESCRIPTION, DESCRIPTION: described})
        (folder / CARD).write_text(card, "utf-8")


def from_elsewhere(name: str, checkpoint: Path) -> str:
    """A path as a run named it; where that was one from a folder above its checkpoint, one from here."""
    with suppress(OSError):  # a folder that may not be entered, or no name of a file
        places = [Path(name), *(folder / name for folder in checkpoint.resolve().parents)]
        return next((str(place) for place in places if place.is_file() or (place / CONFIG).is_file()), name)
    return name
