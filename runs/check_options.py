"""Checks the options: each on its own, then against each other, the machine, and the files that they name."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, get_type_hints

from clip.modules.registry import PRETRAINING, TRAIN_BACKBONES, methods_of
from common.errors import ConfigError, DataError
from common.machine import cores
from common.readers import path, several, wrong
from common.text import natural_key
from config import AUTO, MODEL, OPTIONS, TRAINING, Options
from engine.exported import is_exported
from runs.command_line import is_text, unknown_option
from runs.option_readers import PRECISIONS, MissingTypeReader
from vilt.datasets.custom import CUSTOM
from vilt.datasets.open_spec import open_spec
from vilt.datasets.specs import CLIP, EVERY_DATASET, SPLITS, VLA, DatasetSpec
from vilt.missing_tables import PUBLISHED

PUBLISHED_INTERVALS: dict[str, dict[str | None, float]] = {"hatememes": {None: 0.1, "dcp": 0.11}}
"""Epochs between validations, keyed by task and method, if not 0.2; None stands for all other methods."""
OWNERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "dpl_": ("head", ("dpl",)),
    "lora_": ("prompt_type", ("mora", "lora")),
    "aoept_": ("prompt_type", ("aoept",)),
    "neighbours": ("prompt_type", ("none",)),
    "prompt_length": ("prompt_type", ("mplmm", "mplmm_described")),
    **dict.fromkeys(
        ("far", "fmb", "replay_depth", "decoupling_weight", "dynamic_init", "rdn_hidden", "train_pooler"),
        ("prompt_type", ("rep",)),
    ),
}
"""Options, or prefixes of them, that only some heads or methods have: the option that selects those, and its values."""
FAMILIES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("train_ends", "tokenizer", "vit_activation", "image_size", "image_cache"), (CLIP,)),
    **dict.fromkeys(("rdn_hidden", "mask_readout", "train_pooler"), (VLA,)),
    "network": ("sensors", VLA),
}
"""Options that exist only for some backbone families."""
UNUSED_IN_PRETRAINING = {
    **dict.fromkeys(("simulate_missing", "modality_dropout"), "compares all modalities"),
    **dict.fromkeys(("label_ratio", "teacher"), "uses no labels"),
    "lr_mult": "trains no head",
}
"""Options without effect on the methods in PRETRAINING, and why."""
NEEDS = {"replay_depth": "far", "decoupling_weight": "fmb", "dynamic_init": "fmb"}
"""Options of REP as described, and the option that each needs."""
OUTPUTS = {"predict": ("predictions.csv", ".csv", ".jsonl"), "embed": ("features.npz", ".npz", ".safetensors")}
"""For each command, its default output file and the suffixes accepted for others."""


def check(config: Mapping[str, Any]) -> Options:
    """Checks the whole configuration for consistency and against the machine and the files it names.

    Raises:
        ConfigError: one line that names the option, what was expected and what was found.
    """
    options = read_all(config)
    check_together(options)
    _check_data_and_weights(options)
    return on_this_machine(options)  # last: it loads torch


def resolve(config: Mapping[str, Any]) -> Options:
    """Checks each option on its own and sets those left open to suit this machine.

    Raises:
        ConfigError: see `check`.
    """
    return on_this_machine(read_all(config))


def read_all(config: Mapping[str, Any]) -> Options:
    """Checks each option on its own. Raises ConfigError."""
    values = read_options(config, OPTIONS)
    values["sweep_over"] = values_of_options("sweep_over", values["sweep_over"])
    values["search"] = search_space("search", values["search"])
    for name, overridden in (("test_ratio", "missing_ratio"), ("test_type", "missing_type")):
        if values[name] is not None:
            values[overridden] |= {"val": values[name], "test": values[name]}
    if values["precision"] is None and values["task"] in EVERY_DATASET:
        of_task = EVERY_DATASET[values["task"]].options.get("precision")
        values["precision"] = OPTIONS["precision"].read("precision", of_task)
    if values["val_check_interval"] is None:
        by_method = PUBLISHED_INTERVALS.get(values["task"], {})
        values["val_check_interval"] = by_method.get(values["prompt_type"], by_method.get(None, 0.2))
    return Options(**values)


def read_options(config: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Checks each of the options `names` on its own. Raises ConfigError."""
    found = {}
    for name in names:
        read = OPTIONS[name].read
        row = (row_of(config),) if isinstance(read, MissingTypeReader) else ()
        found[name] = read(name, config[name], *row)
    return found


def row_of(config: Mapping[str, Any]) -> DatasetSpec:
    """The dataset's row; if its modalities are defined by the data, they are read from its arrow files."""
    task = config["task"] if config["task"] in EVERY_DATASET else CUSTOM
    root = config.get("data_root")
    if not EVERY_DATASET[task].modalities and root and isinstance(root, (str, Path)):
        existing = [split for split in SPLITS if (Path(root) / EVERY_DATASET[task].file_name(split)).is_file()]
        with suppress(DataError):  # raised again when the data is opened
            return open_spec(task, Path(root), existing[:1]) if existing else EVERY_DATASET[task]
    return EVERY_DATASET[task]


def read_prediction(config: Mapping[str, Any], command: str, *sources: str) -> Options:
    """Checks the options of predict or embed; exactly one of `sources` must name the samples. Raises ConfigError."""
    later = {name: OPTIONS[name].default for name in ("missing_type", "test_type")}  # by the checkpoint's modalities
    options = read_all({**config, **later})
    if options.load_path is None or sum(getattr(options, source) is not None for source in sources) != 1:
        samples = " or ".join({"input": "input=samples.csv", "split": "split=test"}[source] for source in sources)
        found = ", ".join(name for name in ("load_path", *sources) if getattr(options, name) is not None) or "none"
        expected = f"expected a checkpoint and samples, as in load_path=result/…/best.ckpt {samples}"
        raise ConfigError(f"{command}: {expected}; found {found}")
    default, *suffixes = OUTPUTS[command]
    output = options.output or Path(default)
    if output.suffix not in suffixes:
        raise wrong("output", f"a {' or '.join(suffixes)} file", str(output))
    return on_this_machine(replace(options, output=output))


def read_load_paths(config: Mapping[str, Any]) -> tuple[Path, ...]:
    """The checkpoints and folders of runs in `load_path`, for commands that accept several. Raises ConfigError."""
    if config["load_path"] in (None, ""):
        raise ConfigError(
            "load_path: expected a checkpoint, a list of them, or a folder of runs, as in load_path=result/…/best.ckpt"
        )
    return several(path, texts=True)("load_path", config["load_path"])


def on_this_machine(options: Options) -> Options:
    """Checks num_gpus and precision against the machine, sets those left open, and limits num_workers to its cores."""
    import torch

    available, precision = torch.cuda.device_count(), options.precision
    num_gpus = min(1, available) if options.num_gpus is None else options.num_gpus
    if num_gpus > available:
        remedy = "; leave num_gpus out to run on the CPU" if available == 0 else ""
        raise ConfigError(f"num_gpus: expected at most {available}, the number of GPUs here, found {num_gpus}{remedy}")
    if options.cpu_processes > 1 and num_gpus:
        raise ConfigError(f"cpu_processes: expected 1 with GPUs (num_gpus={num_gpus}), found {options.cpu_processes}")
    if precision == PUBLISHED:
        precision = PRECISIONS["16" if num_gpus else "32"]
    if precision == PRECISIONS["16"] and not num_gpus:
        raise ConfigError("precision: expected 32 or bf16, found 16, which needs a GPU")
    if precision is None and num_gpus:
        precision = PRECISIONS["bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "16"]
    elif precision is None:
        precision = PRECISIONS["bf16" if torch.cpu._is_avx512_bf16_supported() else "32"]
    workers = min(options.num_workers, cores())
    return replace(options, num_gpus=num_gpus, num_workers=workers, precision=precision)


def check_together(options: Options) -> None:
    """Raises ConfigError if options contradict each other or name checkpoints that do not exist."""
    if options.task is None:
        names = ", ".join(f"task_finetune_{name}" for name in EVERY_DATASET)
        raise ConfigError(f"no task: expected one of {names}, as in `python run.py with task_finetune_mmimdb …`")
    _check_method(options)
    family = EVERY_DATASET[options.task].family
    if options.published_f1 and family != VLA:
        raise ConfigError(f"published_f1: expected a task of text, audio and vision, found {options.task}")
    if options.teacher is not None and EVERY_DATASET[options.task].label_range is not None:
        raise ConfigError(f"teacher: expected a task with classes, whose probabilities it gives, found {options.task}")
    frozen = family == VLA and options.prompt_type not in TRAIN_BACKBONES
    if frozen and options.load_path is None and options.vit.startswith("random"):
        raise ConfigError(
            "load_path: expected a checkpoint of stage 1, whose layers stay frozen: of task_pretrain_mosei, or of your "
            "own data with prompt_type=full missing_ratio=0 simulate_missing=False, which trains all layers; found none"
        )
    if options.end_lr >= options.learning_rate:
        highest = f"learning_rate={options.learning_rate:g}"
        raise ConfigError(f"end_lr: expected less than {highest}, found {options.end_lr:g}")
    for name in ("warmup_steps", "end_lr") if options.decay_power == "plateau" else ():
        if found := getattr(options, name):
            raise ConfigError(f"{name}: expected 0 with decay_power=plateau, which has none, found {found:g}")
    if options.test_only and options.load_path is None:
        raise ConfigError("test_only: expected a checkpoint to evaluate, as in load_path=result/…/best.ckpt")
    if len(options.load_paths) > 1 and not options.test_only:
        count = f"found {len(options.load_paths)}"
        raise ConfigError(f"load_path: expected one checkpoint, except with test_only, robustness or predict; {count}")
    if options.finetune_first and options.load_path is None:
        raise ConfigError("finetune_first: expected a checkpoint to start from in load_path")
    if options.resume_from is not None and options.test_only:
        raise ConfigError("resume_from: resumes a training run; test_only contradicts it")
    named: list[tuple[str, Path | str | None]] = [("load_path", one) for one in options.load_paths]
    for name, checkpoint in (*named, ("resume_from", options.resume_from), ("teacher", options.teacher)):
        if checkpoint in (None, AUTO) or Path(checkpoint).is_file():
            continue
        if name != "resume_from" and is_exported(Path(checkpoint)):
            continue
        if not Path(checkpoint).is_dir():
            raise ConfigError(f"{name}: expected a checkpoint file, found nothing at {checkpoint}")
        file = "last.ckpt" if name == "resume_from" else "best.ckpt"
        found = max(Path(checkpoint).rglob(file), key=lambda path: (-len(path.parts), natural_key(path)), default=None)
        hint = f"did you mean {name}={found}?" if found is not None else f"there is no {file} in it"
        raise ConfigError(f"{name}: expected a checkpoint file, found the folder {checkpoint}; {hint}")


def _check_method(options: Options) -> None:
    known = methods_of(EVERY_DATASET[options.task].family)
    if options.prompt_type not in known:
        raise ConfigError(
            f"prompt_type: expected {' or '.join(known)} with task={options.task}, found {options.prompt_type}"
        )
    if (together := PRETRAINING.get(options.prompt_type)) is not None:
        if ratio := options.missing_ratio["train"] or options.missing_ratio["val"]:
            raise ConfigError(f"missing_ratio: expected 0 with prompt_type={options.prompt_type}, found {ratio:g}")
        for name, why in UNUSED_IN_PRETRAINING.items():
            default = OPTIONS[name].default
            if (found := getattr(options, name)) != default:
                expected = f"expected {default} with prompt_type={options.prompt_type}, which {why}"
                raise ConfigError(f"{name}: {expected}, found {found}")
        if options.per_gpu_batchsize % together or options.per_gpu_batchsize == together:
            raise ConfigError(
                f"per_gpu_batchsize: expected a multiple of {together}, the length of a subsequence, for at least 2 "
                f"subsequences, with prompt_type={options.prompt_type}, found {options.per_gpu_batchsize}"
            )
        if options.test_after_fit and not options.fast_dev_run:
            raise ConfigError(f"test_after_fit: expected False with prompt_type={options.prompt_type}, found True")
    length = options.memory_length
    if length % 3:
        raise ConfigError(
            f"memory_length: expected a positive multiple of 3 (private, shared and dynamic slots), found {length}"
        )
    if options.prompt_type == "map_attention" and length % 2:
        raise ConfigError(f"memory_length: expected a multiple of 6 (each third has keys and values), found {length}")
    for name, each in OPTIONS.items():
        owner, values = next((owner for prefix, owner in OWNERS.items() if name.startswith(prefix)), ("", ()))
        if owner and getattr(options, owner) not in values and getattr(options, name) != each.read(name, each.default):
            raise ConfigError(
                f"{name}: is an option of {owner}={' or '.join(values)}, found {owner}={getattr(options, owner)}"
            )
    for name, families in FAMILIES.items():
        without = OPTIONS[name].read(name, OPTIONS[name].default)
        if EVERY_DATASET[options.task].family not in families and getattr(options, name) != without:
            raise ConfigError(f"{name}: is not an option of task={options.task}, found {getattr(options, name)}")
    for name, needed in NEEDS.items():
        if (value := getattr(options, name)) and not getattr(options, needed):
            raise ConfigError(f"{name}: expected {OPTIONS[name].default} with {needed}=False, found {value}")
    if options.group_texts and options.text_windows == 1:
        raise ConfigError("group_texts: expected text_windows above 1, which reads more than the first text; found 1")


def _check_data_and_weights(options: Options) -> None:
    if options.data_root is None:
        raise ConfigError("data_root: expected the folder of the arrow files that make_arrow.py wrote, found nothing")
    spec = EVERY_DATASET[options.task]
    files = [spec.file_name(split) for split in options.splits]
    missing = [name for name in files if not (options.data_root / name).is_file()]
    if missing:
        raise ConfigError(
            f"data_root: expected {', '.join(missing)} in {options.data_root}, found "
            f"{'no such folder' if not options.data_root.is_dir() else 'no such file'}; "
            + spec.how_to_make(options.data_root)
        )
    if spec.family == CLIP and not Path(options.vit).exists() and not options.vit.startswith(("RN", "ViT-")):
        raise ConfigError(
            f"vit: expected one of ViT-B/32, ViT-B/16, ViT-L/14, ViT-L/14@336px, a Hugging Face folder or a weights "
            f"file, found {options.vit!r}"
        )


def values_of_options(option: str, value: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
    """Checks the values that a sweep gives each option of the model or its training. Raises ConfigError."""
    space = {}
    for name, values in value.items():
        if name not in OPTIONS:
            raise ConfigError(f"{option}: {unknown_option(name)}")
        if OPTIONS[name].kind not in (MODEL, TRAINING):
            raise ConfigError(f"{option}.{name}: expected an option of the model or its training, found {name!r}")
        space[name] = several(OPTIONS[name].read, texts=is_text(name))(f"{option}.{name}", values)
    return space


def search_space(option: str, value: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
    """Checks the options to search, each with a range (see `is_range`) or a list of choices. Raises ConfigError."""
    space = values_of_options(option, value)
    for name, values in space.items():
        if len(values) < 2:
            raise wrong(f"{option}.{name}", "a list of at least two values", list(values))
        if is_range(name, values) and values[0] >= values[1]:
            raise wrong(f"{option}.{name}", "a range, the lower end first", list(values))
        if is_range_of_steps(name, values) and (0 < values[0] < 1 or values[1] == 1):
            raise wrong(f"{option}.{name}", "a range of shares, all below 1, or of step counts", list(values))
    return space


def is_range(name: str, values: Sequence[Any]) -> bool:
    """Whether `values` of a search are the two ends of a range: two numbers, for an option of type float."""
    return len(values) == 2 and get_type_hints(Options)[name] is float


def is_range_of_steps(name: str, values: Sequence[Any]) -> bool:
    """Whether a range is one of integers: one of `warmup_steps` that ends at 1 or above (below 1 it is a share)."""
    return name == "warmup_steps" and is_range(name, values) and values[1] >= 1
