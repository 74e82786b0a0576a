"""Reads the configuration files next to CLIP weights: supported settings of images and towers are used, others refused.

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
"""Settings of transformers' image processing, and the values for which it equals this program's; 3 is bicubic."""
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
"""Supported values of the settings that change the towers without changing names or shapes."""
OPEN_CLIP_SIZES = {
    "": {"embed_dim": "embed_dim"},
    "vision_cfg": {
        "image_size": "image_size",
        "patch_size": "patch_size",
        "width": "vision_width",
        "layers": "vision_layers",
    },
    "text_cfg": {"vocab_size": "vocab_size", "width": "text_width", "layers": "text_layers"},
}


def read_open_clip(folder: Path) -> dict[str, Any]:
    """Content of `open_clip_config.json` in `folder`, empty without one; ValueError if unreadable or not supported."""
    path = folder / "open_clip_config.json"
    config = _read(path)
    if path.is_file() and not isinstance(config.get("model_cfg"), dict):
        raise ValueError(f"{path}: expected an object with `model_cfg`")
    for part, known in OPEN_CLIP_TOWERS.items():
        _check(path, _part(path, config.get("model_cfg", {}), part), known, f"model_cfg.{part}.")
    return config


def check_open_clip_sizes(config: Mapping[str, Any], sizes: Mapping[str, Any]) -> None:
    """Raises ValueError if open_clip's configuration contradicts `sizes`, the fields of the architecture."""
    towers = config.get("model_cfg", {})
    for part, names in OPEN_CLIP_SIZES.items():
        entries = towers.get(part, {}) if part else towers
        for name, field in names.items():
            if entries.get(name) not in (None, sizes[field]):
                raise ValueError(
                    f"open_clip_config.json: model_cfg.{part}{'.' * bool(part)}{name}: expected {sizes[field]}, as in "
                    f"the weights, found {quoted(entries[name])}"
                )


def open_clip_heads(config: Mapping[str, Any], vision_width: int) -> dict[str, int]:
    """Numbers of heads in open_clip's configuration, as fields of the architecture."""
    towers = config.get("model_cfg", {})
    width, heads = towers.get("vision_cfg", {}).get("head_width"), towers.get("text_cfg", {}).get("heads")
    found = {} if not _is_size(width) else {"vision_heads": vision_width // width}
    return found | ({"text_heads": heads} if _is_size(heads) else {})


def image_statistics(folder: Path, image_size: int) -> dict[str, tuple[float, ...]]:
    """`image_mean` and `image_std`, if a file in `folder` has them.

    Raises:
        ValueError: a file is unreadable, or prepares images differently from docs/method.md section 1; the message
            names file and value.
    """
    found: dict[str, tuple[float, ...]] = {}
    for name, part, known, prefix in (
        ("preprocessor_config.json", "", HF_IMAGES, "image_"),
        ("processor_config.json", "image_processor", HF_IMAGES, "image_"),
        ("open_clip_config.json", "preprocess_cfg", OPEN_CLIP_IMAGES, ""),
    ):
        path, label = folder / name, f"{part}." if part else ""
        content = _part(path, _read(path), part) if part else _read(path)
        others = {name: (False,) for name in content if name.startswith("do_") and name not in known}
        _check(path, content, {**known, **others}, label)
        for side in ("size", "crop_size"):
            _check_side(path, content, side, image_size, label)
        for field in ("mean", "std"):
            values = content.get(prefix + field)
            if values is None:
                continue
            if not (isinstance(values, list) and len(values) == 3 and all(_is_fit(field, value) for value in values)):
                raise ValueError(f"{path}: {label}{prefix}{field}: expected three numbers, found {quoted(values)}")
            read = tuple(map(float, values))
            if found.setdefault(f"image_{field}", read) != read:
                raise ValueError(
                    f"{path}: {prefix}{field}: expected {found[f'image_{field}']}, as in the other file, found {read}"
                )
    return found


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


def _check(path: Path, content: Mapping[str, Any], known: Mapping[str, tuple[Any, ...]], label: str) -> None:
    for name, values in known.items():
        found = content.get(name)
        close = isinstance(found, float) and any(
            isinstance(value, float) and math.isclose(found, value, rel_tol=1e-3) for value in values
        )
        if found is not None and found not in values and not close:
            expected = " or ".join(map(str, values))
            raise ValueError(
                f"{path}: {label}{name}: expected {expected}, found {quoted(found)}, which is not supported"
            )


def _check_side(path: Path, content: Mapping[str, Any], name: str, image_size: int, label: str) -> None:
    found = content.get(name)
    squashes = name == "size" and (
        (isinstance(found, dict) and "shortest_edge" not in found) or content.get("default_to_square")
    )
    sides = found.values() if isinstance(found, dict) else found if isinstance(found, list) else [found]
    if found is not None and (squashes or any(side != image_size for side in sides)):
        raise ValueError(
            f"{path}: {label}{name}: expected a shortest_edge of {image_size} to match the position embeddings, "
            f"found {quoted(found)}"
        )


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_fit(field: str, value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value) and (value > 0 or field == "mean")
