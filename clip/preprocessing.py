"""What the files beside CLIP weights say of images and towers: what can differ is used, anything else refused.

`preprocessor_config.json` and `processor_config.json` are Hugging Face's, `open_clip_config.json` is open_clip's.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.errors import DataError
from common.messages import quoted
from common.strict_json import read_json

HF_IMAGES: dict[str, tuple[Any, ...]] = {
    "do_resize": (True,),
    "do_center_crop": (True,),
    "do_rescale": (True,),
    "do_normalize": (True,),
    "do_convert_rgb": (True,),
    "rescale_factor": (1 / 255,),
    "resample": (3,),
    "crop_pct": (1.0,),
    "use_square_size": (False,),
    "image_processor_type": ("CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPImageProcessorPil"),
    "feature_extractor_type": ("CLIPFeatureExtractor", "CLIPImageProcessor"),
}
"""What transformers may do to images, and the values for which it does what this program does; 3 is bicubic."""
OPEN_CLIP_IMAGES: dict[str, tuple[Any, ...]] = {
    "interpolation": ("bicubic",),
    "resize_mode": ("shortest",),
    "mode": ("RGB",),
}
OPEN_CLIP_TOWERS: dict[str, dict[str, tuple[Any, ...]]] = {
    "vision_cfg": {
        "pool_type": ("tok",),
        "global_average_pool": (False,),
        "act_kwargs": ({},),
        "norm_kwargs": ({}, {"eps": 1e-5}),
    },
    "text_cfg": {
        "context_length": (77,),
        "pool_type": ("argmax",),
        "no_causal_mask": (False,),
        "hf_tokenizer_name": ("",),
        "tokenizer_kwargs": ({},),
        "act_kwargs": ({},),
        "norm_kwargs": ({}, {"eps": 1e-5}),
    },
}
"""What changes the towers without showing in names and shapes."""


def read_open_clip(folder: Path) -> dict[str, Any]:
    """`open_clip_config.json` in `folder`; empty where there is none. Raises ValueError: not readable or supported."""
    path = folder / "open_clip_config.json"
    config = _read(path)
    if path.is_file() and not isinstance(config.get("model_cfg"), dict):
        raise ValueError(f"{path}: expected an object with `model_cfg`")
    for part, known in OPEN_CLIP_TOWERS.items():
        _check(path, _part(path, config.get("model_cfg", {}), part), known, f"model_cfg.{part}.")
    return config


def open_clip_heads(config: Mapping[str, Any], vision_width: int) -> dict[str, int]:
    """Numbers of heads that open_clip's configuration gives, as fields of the architecture."""
    towers = config.get("model_cfg", {})
    width, heads = towers.get("vision_cfg", {}).get("head_width"), towers.get("text_cfg", {}).get("heads")
    found = {} if not _is_size(width) else {"vision_heads": vision_width // width}
    return found | ({"text_heads": heads} if _is_size(heads) else {})


def image_statistics(folder: Path, image_size: int) -> dict[str, tuple[float, ...]]:
    """`image_mean` and `image_std` where a file in `folder` says them.

    Raises:
        ValueError: a file is not readable, or says that images are prepared otherwise than docs/method.md section 1
            has it; names file and value.
    """
    found: dict[str, tuple[float, ...]] = {}
    for name, part, read in (
        ("preprocessor_config.json", None, _of_hugging_face),
        ("processor_config.json", "image_processor", _of_hugging_face),
        ("open_clip_config.json", "preprocess_cfg", _of_open_clip),
    ):
        path = folder / name
        content = _read(path) if part is None else _part(path, _read(path), part)
        for field, values in read(path, content, image_size).items():
            if found.setdefault(field, values) != values:
                raise ValueError(f"{path}: {field} {values}, another file beside it says {found[field]}")
    return found


def _of_hugging_face(path: Path, content: Mapping[str, Any], image_size: int) -> dict[str, tuple[float, ...]]:
    others = {name: (False,) for name in content if name.startswith("do_") and name not in HF_IMAGES}
    _check(path, content, {**HF_IMAGES, **others})
    size = content.get("size")
    if (isinstance(size, dict) and "shortest_edge" not in size) or (
        _is_size(size) and content.get("default_to_square")
    ):
        raise ValueError(f"{path}: size: expected the shortest_edge, so that images keep their shape, found {size}")
    _check_size(path, content, "size", image_size)
    _check_size(path, content, "crop_size", image_size)
    return _statistics(path, content, {"image_mean": "image_mean", "image_std": "image_std"})


def _of_open_clip(path: Path, content: Mapping[str, Any], image_size: int) -> dict[str, tuple[float, ...]]:
    _check(path, content, OPEN_CLIP_IMAGES, "preprocess_cfg.")
    _check_size(path, content, "size", image_size, "preprocess_cfg.")
    return _statistics(path, content, {"image_mean": "mean", "image_std": "std"}, "preprocess_cfg.")


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_json(path) if path.is_file() else {}
    except DataError as error:
        raise ValueError(str(error)) from error


def _part(path: Path, content: Mapping[str, Any], name: str) -> dict[str, Any]:
    part = content.get(name) or {}
    if not isinstance(part, dict):
        raise ValueError(f"{path}: {name}: expected an object, found {quoted(part)}")
    return part


def _check(path: Path, content: Mapping[str, Any], known: Mapping[str, tuple[Any, ...]], part: str = "") -> None:
    for name, values in known.items():
        found = content.get(name)
        same = any(
            math.isclose(found, value, rel_tol=1e-3)
            if isinstance(value, float) and isinstance(found, (int, float))
            else found == value
            for value in values
        )
        if found is not None and not same:
            expected = " or ".join(map(str, values))
            raise ValueError(
                f"{path}: {part}{name}: expected {expected}, found {quoted(found)}, which is not supported"
            )


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _check_size(path: Path, content: Mapping[str, Any], name: str, image_size: int, part: str = "") -> None:
    found = content.get(name)
    sides = found.values() if isinstance(found, dict) else found if isinstance(found, list) else [found]
    if found is not None and set(sides) != {image_size}:
        raise ValueError(
            f"{path}: {part}{name}: expected {image_size}, which the position embeddings are for, found {quoted(found)}"
        )


def _statistics(
    path: Path, content: Mapping[str, Any], names: Mapping[str, str], part: str = ""
) -> dict[str, tuple[float, ...]]:
    found = {}
    for field, name in names.items():
        values = content.get(name)
        if values is None:
            continue
        numbers = values if isinstance(values, list) else [values]
        fit = all(
            isinstance(x, (int, float)) and math.isfinite(x) and (x > 0 or name == names["image_mean"]) for x in numbers
        )
        if len(numbers) != 3 or not fit:
            raise ValueError(
                f"{path}: {part}{name}: expected three numbers, one for each colour, found {quoted(values)}"
            )
        found[field] = tuple(map(float, numbers))
    return found
