"""The options: defaults and named configs (Sacred), and their check before anything heavy starts."""

import difflib
import json
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import torch

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "pkg_resources is deprecated")  # Sacred's; requirements.txt holds setuptools back
    from sacred import SETTINGS, Experiment, arg_parser
    from sacred.arg_parser import get_config_updates
    from sacred.config.config_files import HANDLER_BY_EXT
    from sacred.config.utils import normalize_or_die
    from sacred.utils import ConfigAddedError, SacredError

from clip.backbone import HUB_NAMES
from clip.modules.heads import HEADS
from clip.modules.method import MethodOptions
from clip.modules.registry import METHODS
from clip.modules.vision_transformer_memory import ACTIVATIONS
from clip.optimization import OPTIMIZERS, OptimizerSettings
from clip.resume import AUTO
from clip.run_folder import read_json
from clip.run_table import COLUMNS
from clip.tasks import TASK_NAMES, TASKS
from common.errors import ConfigError
from common.messages import first_line, quoted
from vilt.datamodules import DataSettings
from vilt.datasets.custom import CUSTOM
from vilt.datasets.specs import EVERY_DATASET, SPLITS, Split
from vilt.missing_tables import DRAWINGS, MISSING_TYPES, PUBLISHED, MissingPattern

SETTINGS.CAPTURE_MODE = "no"  # Sacred would otherwise take over standard output, progress bars included
arg_parser.restore = lambda value: value  # Sacred's own, jsonpickle, calls what a value on the command line names
SETTINGS.HOST_INFO.INCLUDE_GPU_INFO = False  # run.py records the devices itself
for _extension in set(HANDLER_BY_EXT) - {".json"}:  # of the files that `with` takes; pickles and YAML can run code,
    del HANDLER_BY_EXT[_extension]
HANDLER_BY_EXT[".json"].load = lambda file: read_json(Path(file.name))  # and so can Sacred's own reading of JSON

__all__ = [
    "EX",
    "ConfigAddedError",
    "Options",
    "SacredError",
    "check",
    "check_command_line",
    "check_together",
    "options_in_files",
    "read_load_paths",
    "read_options",
    "read_with_machine",
    "resolve",
    "unknown_option",
]

EX = Experiment("REP", save_git_info=False)
logging.getLogger("REP").setLevel(logging.CRITICAL)  # Sacred's steps and type changes; run.py and `check` tell
EX.logger = logging.getLogger("REP")  # type: ignore[assignment]
FLAGS = {"-h": False, "--help": False, "-u": False, "--unobserved": False, "-F": True, "--file_storage=": True}
"""Sacred's flags that serve here, with whether a value is part of them."""
LAUNCHERS = ("local", "slurm", "submitit_local", "commands")
PUBLISHED_INTERVALS: dict[str, dict[str | None, float]] = {"hatememes": {None: 0.1, "dcp": 0.11}}
"""Epochs between validations, by task and method, where they are not 0.2."""
PRECISIONS = {"32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed"}


@EX.config
def defaults() -> None:
    exp_name = "rep"  # name of the run's folder
    seed = 0  # draws initial memory, order of samples, dropout, missing tables
    task = None  # set by task_finetune_mmimdb, task_finetune_food101, task_finetune_hatememes, task_finetune_custom

    # Data
    data_root = ""  # folder of the arrow files that make_arrow.py wrote
    missing_ratio = {"train": 0.7, "val": 0.7, "test": 0.7}  # share of samples that lose a modality; a number sets all
    missing_type = {"train": "both", "val": "both", "test": "both"}  # text, image or both; one word sets all
    both_ratio = 0.5  # for both: share of the incomplete samples that lose the image (the others lose the text)
    missing_table_root = "datasets/missing_tables"  # where missing tables are kept
    missing_tables = "nested"  # how they are drawn; published: as the published code draws them
    order_seed = None  # draws the order of the training samples; None: seed
    simulate_missing = False  # in training, complete samples too lose a modality at random, anew in each epoch
    num_workers = 8  # loader processes; at most as many as there are cores
    image_cache = False  # keep decoded images beside the arrow files, for machines whose CPU cannot feed the GPU

    # Model
    vit = "ViT-B/16"  # CLIP weights: ViT-B/32, ViT-B/16, ViT-L/14, ViT-L/14@336px, a Hugging Face folder, or a file
    vit_activation = None  # quick_gelu or gelu, for open_clip state dicts that do not say it
    tokenizer = None  # Hugging Face folder or name, or CLIP's merges file; None: the one that comes with vit
    trust_backbone = False  # run a TorchScript archive whose SHA-256 is not one that OpenAI published
    prompt_type = "rep"  # the method: rep, dcp, map_input, map_attention, maple, coop, msp or none
    memory_length = 36  # memory slots in all; a third each private, shared, dynamic
    memory_depth = 6  # blocks of each tower that get private slots
    head = "linear"  # linear, or prototype (DPL)
    far = True  # REP: residual bypass, and replay if replay_depth is above 0; False for ablations
    fmb = True  # REP: private slots by missing type, and shared slots; False for ablations
    replay_depth = 0  # REP as described: blocks after memory_depth that get back what earlier ones made of the slots
    decoupling_weight = 0  # REP as described: weight of the loss that keeps private and shared slots apart
    dynamic_init = False  # REP as described: shared slots start from the sample, too
    image_size = None  # side of the images; None: the backbone's, and no other is possible

    # Optimisation
    batch_size = 256  # effective batch, reached by accumulation
    per_gpu_batchsize = 32  # samples per process and forward pass
    optim_type = "adamw"  # adamw (as in transformers 4.2.1), adam or sgd
    learning_rate = 1e-2  # at the end of the warm-up
    lr_mult = 1  # factor on the learning rate of the head
    weight_decay = 2e-2  # none on biases and on the norms within RDNs
    max_epoch = 20  # epochs
    max_steps = None  # optimiser steps; None: as many as max_epoch needs
    warmup_steps = 0.1  # optimiser steps of linear warm-up, or a share of all if below 1
    decay_power = 1  # power of the polynomial decay, or cosine
    end_lr = 0  # learning rate at the last step
    val_check_interval = None  # epochs between validations, or batches if above 1; None: as published
    precision = None  # 32, 16, bf16, or published: 16 on a GPU; None: bf16 where the hardware has it, else 16 or 32
    skip_bad_steps = 20  # with precision 16: optimiser steps in a row that may be skipped for an overflow

    # Machine
    num_gpus = None  # GPUs per node, or a list as [0]; None: 1 if there is one, else 0 (the CPU)
    num_nodes = 1  # machines
    cpu_processes = 1  # processes, without GPUs
    activation_checkpointing = False  # less memory for larger batches, at the price of a second forward pass

    # Course of the run
    log_dir = "result"  # folder of the run folders
    load_path = ""  # checkpoint: to evaluate with test_only, else a warm start
    published_seed = 0  # seed of the run that wrote a published checkpoint: draws its dynamic queries
    finetune_first = False  # warm start takes the head too (a checkpoint of the same task)
    resume_from = None  # checkpoint `last.ckpt` of an interrupted run: goes on where it stood; auto: finds it
    fast_dev_run = False  # one batch of everything, nothing written
    test_after_fit = True  # evaluate the best checkpoint on the test split after training
    test_only = False  # evaluate load_path on the test split
    test_ratio = None  # missing ratio of validation and test
    test_type = None  # missing type of validation and test
    test_exp_name = None  # name of the folder of a test_only run

    # `run.py robustness`: load_path (also a list, or a folder of runs) at every combination of these
    robustness_types = ["text", "image", "both"]  # missing types
    robustness_ratios = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]  # missing ratios
    robustness_both_ratios = None  # values of both_ratio, for missing type both; None: both_ratio alone
    robustness_seeds = [0, 1, 2, 3, 4]  # seeds of the missing tables
    bootstrap = 1000  # resamples behind the confidence intervals; 0: no intervals
    robustness_anew = False  # replace stored logits that do not fit the checkpoint, test set or precision

    # `run.py runs`
    runs_sort = "date"  # column that the table of runs is sorted by; -date and the like: the other way round

    # `run.py predict`: load_path on samples of one's own
    input = None  # CSV, TSV or JSONL with columns image, text and maybe id, or a folder of images and texts
    output = "predictions.csv"  # file to write, .csv or .jsonl

    # `run.py report`
    runs = "result"  # run folders, or folders that hold some
    out = "report"  # folder that the report is written to

    # Sweep: many runs, `python run.py sweep with …`
    sweep_name = "sweep"  # name of the folder, below log_dir, of all that a sweep writes
    sweep_types = ["text", "image", "both"]  # missing types of the grid, each for training and test alike
    sweep_ratios = [0.5, 0.7, 0.9]  # missing ratios of the grid
    sweep_seeds = [0, 1, 2]  # seeds of the grid
    sweep_over = None  # further options of the grid, as sweep_over.memory_depth=[3,6] sweep_over.memory_length=[12,36]
    sweep_launcher = "local"  # local, slurm, submitit_local (as on SLURM, here), or commands (a list, nothing run)
    sweep_slurm = None  # submitit's parameters, as sweep_slurm.partition=gpu sweep_slurm.timeout_min=600
    search = None  # instead of a grid, options to find good values of: search.learning_rate=[1e-4,1e-1]
    search_trials = 20  # complete trials that a search ends with


@EX.named_config
def rep_described() -> None:
    replay_depth = 6
    decoupling_weight = 0.1
    dynamic_init = True


@EX.named_config
def published() -> None:
    missing_tables = "published"
    order_seed = 0
    precision = "published"


@EX.named_config
def ablation() -> None:
    sweep_over = {"far": [False, True], "fmb": [False, True]}


@EX.named_config
def task_finetune_mmimdb() -> None:
    exp_name = "finetune_mmimdb"
    task = "mmimdb"


@EX.named_config
def task_finetune_food101() -> None:
    exp_name = "finetune_food101"
    task = "food101"


@EX.named_config
def task_finetune_hatememes() -> None:
    exp_name = "finetune_hatememes"
    task = "hatememes"


@EX.named_config
def task_finetune_custom() -> None:
    exp_name = "finetune_custom"
    task = "custom"


# The check. A reader of a value takes (option, value) and returns the value to use, or raises ConfigError.

Reader = Callable[[str, Any], Any]
OF_THE_METHOD = frozenset(
    {"simulate_missing", "vit", "vit_activation", "tokenizer", "prompt_type", "memory_length", "memory_depth"}
    | {"head", "far", "fmb", "replay_depth", "decoupling_weight", "dynamic_init"}
    | {
        "batch_size",
        "per_gpu_batchsize",
        "optim_type",
        "learning_rate",
        "lr_mult",
        "weight_decay",
        "max_epoch",
        "max_steps",
    }
    | {"warmup_steps", "decay_power", "end_lr", "val_check_interval", "precision", "finetune_first"}
)
"""Options of the model and its training: those that a search or a sweep can vary."""


def _wrong(option: str, expected: str, value: Any) -> ConfigError:
    return ConfigError(f"{option}: expected {expected}, found {quoted(value)}")


def _is_number(value: Any) -> bool:
    """Whether `value` is a number that float holds, not infinite and not NaN."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # of an integer with hundreds of digits
        return False


def integer(low: int, high: int = 2**63 - 1) -> Reader:
    """Reads an integer from `low` to `high`."""

    def read(option: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            at_most = f" and at most {high}" if isinstance(value, int) and value > high else ""
            raise _wrong(option, f"an integer of at least {low}{at_most}", value)
        return value

    return read


SEED = integer(0, 2**32 - 1)
"""As many as NumPy and Lightning take."""


def number(low: float, high: float = float("inf"), *, above: bool = False) -> Reader:
    """Reads a number from `low` (exclusive if `above`) to `high`."""

    def read(option: str, value: Any) -> float:
        if not _is_number(value) or not low <= value <= high or (above and value == low):
            span = f"above {low:g}" if above else f"of at least {low:g}" if high == float("inf") else ""
            raise _wrong(option, f"a number {span or f'from {low:g} to {high:g}'}", value)
        return float(value)

    return read


def flag(option: str, value: Any) -> bool:
    """Reads True or False."""
    if not isinstance(value, bool):
        raise _wrong(option, "True or False", value)
    return value


def one_of(*choices: str) -> Reader:
    """Reads one of some words."""

    def read(option: str, value: Any) -> str:
        if value not in choices:
            raise _wrong(option, " or ".join(choices), value)
        return str(value)

    return read


def task_name(option: str, value: Any) -> str:
    """Reads the name of a task."""
    if value not in TASK_NAMES:
        raise ConfigError(f"{_wrong(option, ' or '.join(TASKS), value)}; data of your own is {CUSTOM}")
    return str(value)


def text(option: str, value: Any) -> str:
    """Reads a text; a number is one too, since Sacred reads `exp_name=7` as a number."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise _wrong(option, "a text", value)
    return str(value)


def folder_name(option: str, value: Any) -> str:
    """Reads the name of a folder without a path."""
    name = text(option, value)
    if name in ("", ".", "..") or "/" in name or "\\" in name or not name.isprintable() or not _may_be_path(name):
        raise _wrong(option, "the name of a folder, without slashes", value)
    return name


def path(option: str, value: Any) -> Path:
    """Reads a path; `~` is the home folder."""
    try:
        return Path(path_or_name(option, value)).expanduser()
    except RuntimeError:  # no such user
        raise _wrong(option, "a path", value) from None


def path_or_name(option: str, value: Any) -> str:
    """Reads a text that may be a path."""
    name = text(option, value)
    if not _may_be_path(name):
        raise _wrong(option, "a path", value)
    return name


def _may_be_path(name: str) -> bool:
    """False for what the file system can have no file of: too long, with a NUL or half of a surrogate pair."""
    try:
        parts = os.fsencode(name).split(b"/")
    except UnicodeEncodeError:
        return False
    return "\0" not in name and len(name) < 4096 and max(map(len, parts)) < 256


def prediction_file(option: str, value: Any) -> Path:
    """Reads the path of a file that predictions can be written to."""
    found = path(option, value)
    if found.suffix not in (".csv", ".jsonl"):
        raise _wrong(option, "a file .csv or .jsonl", value)
    return found


def path_or_auto(option: str, value: Any) -> Path | str:
    """Reads a path, or `auto`."""
    return AUTO if value == AUTO else path(option, value)


def optional(reader: Reader) -> Reader:
    """Reads None, an empty text (None too), or what `reader` reads."""
    return lambda option, value: None if value is None or value == "" else reader(option, value)


def per_split(reader: Reader) -> Reader:
    """Reads one value for all splits, or a dictionary of train, val and test."""

    def read(option: str, value: Any) -> dict[Split, Any]:
        if not isinstance(value, Mapping):
            return {split: reader(option, value) for split in SPLITS}
        if set(value) != set(SPLITS):
            raise _wrong(option, f"a value, or a dictionary of {', '.join(SPLITS)}", dict(value))
        return {split: reader(f"{option}.{split}", value[split]) for split in SPLITS}

    return read


def several(reader: Reader) -> Reader:
    """Reads a list of different values, at least one, into a tuple; a single value is a list of one.

    A shell makes `[text,image]` of `["text","image"]`, which Sacred then takes for a text: read as the list too.
    """

    def read(option: str, value: Any) -> tuple[Any, ...]:
        if isinstance(value, str) and value.startswith("[") and value.endswith("]"):
            words = [word.strip() for word in value[1:-1].split(",")]
            value = [get_config_updates([f"word={word}"])[0]["word"] for word in words if word]
        elif isinstance(value, str) and value.startswith(("[", "(")):
            raise _wrong(option, """a list as Python writes it, such as "['a','b']" or [1,2]""", value)
        values = [reader(option, one) for one in value] if isinstance(value, (list, tuple)) else [reader(option, value)]
        if not values:
            raise _wrong(option, "at least one value", list(value))
        twice = [one for place, one in enumerate(values) if one in values[:place]]
        if twice:
            raise ConfigError(f"{option}: expected each value once, found {twice[0]} twice")
        return tuple(values)

    return read


def dictionary(option: str, value: Any) -> dict[str, Any]:
    """Reads a dictionary; None is an empty one."""
    value = {} if value is None else value
    if not isinstance(value, Mapping):
        raise _wrong(option, f"a dictionary, or one entry as in {option}.NAME=VALUE", value)
    return {str(key): entry for key, entry in value.items()}


def values_of_options(option: str, value: Any) -> dict[str, tuple[Any, ...]]:
    """Reads a dictionary of options of the model or its training, each with several values."""
    space = {}
    for name, values in dictionary(option, value).items():
        place = f"{option}.{name}"
        if name not in Options.__dataclass_fields__:
            raise ConfigError(f"{option}: {unknown_option([name], list(Options.__dataclass_fields__))}")
        if name not in OF_THE_METHOD:
            raise ConfigError(f"{place}: expected an option of the model or its training, found {name!r}")
        space[name] = several(_reader(name))(place, values)
    return space


def search_space(option: str, value: Any) -> dict[str, tuple[Any, ...]]:
    """Reads a dictionary of options, each with the values to look among (see `is_range`)."""
    space = values_of_options(option, value)
    for name, values in space.items():
        if len(values) < 2:
            raise _wrong(f"{option}.{name}", "a list of at least two values", list(values))
        if is_range(name, values) and values[0] >= values[1]:
            raise _wrong(f"{option}.{name}", "a range, the lower end first", list(values))
        if is_range_of_steps(name, values) and (0 < values[0] < 1 or values[1] == 1):
            raise _wrong(f"{option}.{name}", "a range of shares, all below 1, or of numbers of steps", list(values))
    return space


def is_range(name: str, values: Sequence[Any]) -> bool:
    """Whether `values` of a search are the two ends of a range: two numbers for an option that is any number."""
    return len(values) == 2 and get_args(_hints()[name])[0] is float


def is_range_of_steps(name: str, values: Sequence[Any]) -> bool:
    """Whether a range is of whole numbers: of `warmup_steps` up to 1 or more, where below 1 it is a share."""
    return name == "warmup_steps" and is_range(name, values) and values[1] >= 1


def warmup(option: str, value: Any) -> float:
    """Reads a share below 1 or a whole number of steps."""
    if not _is_number(value) or value < 0 or (value >= 1 and value != int(value)):
        raise _wrong(option, "a share below 1 or a number of steps", value)
    return float(value)


def interval(option: str, value: Any) -> int | float:
    """Reads a share of an epoch (up to 1) or a number of batches."""
    if _is_number(value) and (0 < value <= 1 or (isinstance(value, int) and value > 1)):
        return value if isinstance(value, int) and value > 1 else float(value)
    raise _wrong(option, "a share of an epoch above 0 and up to 1, or an integer number of batches", value)


def power(option: str, value: Any) -> float | str:
    """Reads a positive number or `cosine`."""
    return "cosine" if value == "cosine" else number(0, above=True)(option, value)


def sort_order(option: str, value: Any) -> str:
    """Reads a column of the table of runs, with `-` in front for descending order."""
    if str(value).removeprefix("-") not in COLUMNS:
        raise _wrong(option, f"{', '.join(COLUMNS)}, or one of these with - in front", value)
    return str(value)


def lightning_precision(option: str, value: Any) -> str:
    """Reads 32, 16 or bf16, also in Lightning's spelling, or `published`."""
    word = str(value)
    if word == PUBLISHED or word in PRECISIONS.values():
        return word
    if word not in PRECISIONS:
        raise _wrong(option, "32, 16, bf16 or published", value)
    return PRECISIONS[word]


def gpus(option: str, value: Any) -> int:
    """Reads a number of GPUs, or the list of the first ones: [0], [0, 1], …"""
    if isinstance(value, (list, tuple)) and value:
        if list(value) != list(range(len(value))):
            raise ConfigError(
                f"{option}: expected a number, or the first GPUs as in [0] or [0,1], found {list(value)}; "
                f"CUDA_VISIBLE_DEVICES chooses others"
            )
        return len(value)
    return integer(0)(option, value)


def method_name(option: str, value: Any) -> str:
    """Reads the name of a method."""
    if value in ("input", "attention"):  # in the published README
        raise ConfigError(f"{_wrong(option, ' or '.join(METHODS), value)}; MAP's are map_input and map_attention")
    return one_of(*METHODS)(option, value)


@dataclass(frozen=True)
class Options:
    """The checked options; the comments in `defaults` say what each is."""

    exp_name: Annotated[str, folder_name]
    seed: Annotated[int, SEED]
    task: Annotated[str, optional(task_name)]
    data_root: Annotated[Path, optional(path)]
    missing_ratio: Annotated[dict[Split, float], per_split(number(0, 1))]
    missing_type: Annotated[dict[Split, str], per_split(one_of(*MISSING_TYPES))]
    both_ratio: Annotated[float, number(0, 1)]
    missing_table_root: Annotated[Path, path]
    missing_tables: Annotated[str, one_of(*DRAWINGS)]
    order_seed: Annotated[int | None, optional(SEED)]
    simulate_missing: Annotated[bool, flag]
    num_workers: Annotated[int, integer(0)]
    image_cache: Annotated[bool, flag]
    vit: Annotated[str, path_or_name]
    vit_activation: Annotated[str | None, optional(one_of(*ACTIVATIONS))]
    tokenizer: Annotated[str | None, optional(path_or_name)]
    trust_backbone: Annotated[bool, flag]
    prompt_type: Annotated[str, method_name]
    memory_length: Annotated[int, integer(3)]
    memory_depth: Annotated[int, integer(1)]
    head: Annotated[str, one_of(*HEADS)]
    far: Annotated[bool, flag]
    fmb: Annotated[bool, flag]
    replay_depth: Annotated[int, integer(0)]
    decoupling_weight: Annotated[float, number(0)]
    dynamic_init: Annotated[bool, flag]
    image_size: Annotated[int | None, optional(integer(1))]
    batch_size: Annotated[int, integer(1)]
    per_gpu_batchsize: Annotated[int, integer(1)]
    optim_type: Annotated[str, one_of(*OPTIMIZERS)]
    learning_rate: Annotated[float, number(0, above=True)]
    lr_mult: Annotated[float, number(0, above=True)]
    weight_decay: Annotated[float, number(0)]
    max_epoch: Annotated[int, integer(1)]
    max_steps: Annotated[int | None, optional(integer(1))]
    warmup_steps: Annotated[float, warmup]
    decay_power: Annotated[float | str, power]
    end_lr: Annotated[float, number(0)]
    val_check_interval: Annotated[int | float, optional(interval)]
    precision: Annotated[str, optional(lightning_precision)]
    skip_bad_steps: Annotated[int, integer(0)]
    num_gpus: Annotated[int, optional(gpus)]
    num_nodes: Annotated[int, integer(1)]
    cpu_processes: Annotated[int, integer(1)]
    activation_checkpointing: Annotated[bool, flag]
    log_dir: Annotated[Path, path]
    load_path: Annotated[Path | None, optional(path)]
    published_seed: Annotated[int, SEED]
    finetune_first: Annotated[bool, flag]
    resume_from: Annotated[Path | str | None, optional(path_or_auto)]
    fast_dev_run: Annotated[bool, flag]
    test_after_fit: Annotated[bool, flag]
    test_only: Annotated[bool, flag]
    test_ratio: Annotated[float | None, optional(number(0, 1))]
    test_type: Annotated[str | None, optional(one_of(*MISSING_TYPES))]
    test_exp_name: Annotated[str | None, optional(folder_name)]
    robustness_types: Annotated[tuple[str, ...], several(one_of(*MISSING_TYPES))]
    robustness_ratios: Annotated[tuple[float, ...], several(number(0, 1))]
    robustness_both_ratios: Annotated[tuple[float, ...] | None, optional(several(number(0, 1)))]
    robustness_seeds: Annotated[tuple[int, ...], several(SEED)]
    bootstrap: Annotated[int, integer(0)]
    robustness_anew: Annotated[bool, flag]
    runs_sort: Annotated[str, sort_order]
    input: Annotated[Path | None, optional(path)]
    output: Annotated[Path, prediction_file]
    runs: Annotated[tuple[Path, ...], several(path)]
    out: Annotated[Path, path]
    sweep_name: Annotated[str, folder_name]
    sweep_types: Annotated[tuple[str, ...], several(one_of(*MISSING_TYPES))]
    sweep_ratios: Annotated[tuple[float, ...], several(number(0, 1))]
    sweep_seeds: Annotated[tuple[int, ...], several(SEED)]
    sweep_over: Annotated[dict[str, tuple[Any, ...]], values_of_options]
    sweep_launcher: Annotated[str, one_of(*LAUNCHERS)]
    sweep_slurm: Annotated[dict[str, Any], dictionary]
    search: Annotated[dict[str, tuple[Any, ...]], search_space]
    search_trials: Annotated[int, integer(1)]

    @property
    def processes(self) -> int:
        """Of all nodes together."""
        return self.num_nodes * (self.num_gpus or self.cpu_processes)

    @property
    def accumulation(self) -> int:
        """Forward passes per optimiser step, rounded down as published."""
        return max(1, self.batch_size // (self.per_gpu_batchsize * self.processes))

    def method(self) -> MethodOptions:
        """The part of the options that says what the towers get."""
        return MethodOptions(**{field.name: getattr(self, field.name) for field in fields(MethodOptions)})

    @property
    def splits(self) -> tuple[Split, ...]:
        """The splits that this run reads."""
        if self.test_only:
            return ("test",)
        return SPLITS if self.test_after_fit and not self.fast_dev_run else ("train", "val")

    def robustness_patterns(self) -> list[list[MissingPattern]]:
        """The cells of a robustness matrix: of each, its pattern with every table seed."""
        both_ratios = {"both": self.robustness_both_ratios or (self.both_ratio,)}  # the other types do not depend on it
        return [
            [
                MissingPattern(missing_type, ratio, both_ratio, seed, self.missing_tables)
                for seed in self.robustness_seeds
            ]
            for missing_type in self.robustness_types
            for both_ratio in both_ratios.get(missing_type, (self.both_ratio,))
            for ratio in self.robustness_ratios
        ]

    def data_settings(self) -> DataSettings:
        """The part of the options that the loaders need."""
        return DataSettings(
            dataset=self.task,
            data_root=self.data_root,
            missing_table_root=self.missing_table_root,
            patterns={
                split: MissingPattern(
                    self.missing_type[split],
                    self.missing_ratio[split],
                    self.both_ratio,
                    self.seed,
                    self.missing_tables,
                )
                for split in SPLITS
            },
            simulate_missing=self.simulate_missing,
            per_gpu_batchsize=self.per_gpu_batchsize,
            num_workers=self.num_workers,
            image_cache=self.image_cache,
            seed=self.seed,
            order_seed=self.seed if self.order_seed is None else self.order_seed,
        )

    def optimizer_settings(self) -> OptimizerSettings:
        """The part of the options that the optimiser needs."""
        return OptimizerSettings(
            optim_type=self.optim_type,
            learning_rate=self.learning_rate,
            lr_mult=self.lr_mult,
            weight_decay=self.weight_decay,
            warmup_steps=self.warmup_steps,
            end_lr=self.end_lr,
            decay_power=self.decay_power,
            max_steps=self.max_steps,
        )


def check(config: Mapping[str, Any]) -> Options:
    """The whole configuration, checked against itself, the machine and the files it names.

    Raises:
        ConfigError: one line that names the option, what was expected and what was found.
    """
    options = resolve(config)
    check_together(options)
    _check_data_and_weights(options)
    return options


def resolve(config: Mapping[str, Any]) -> Options:
    """The configuration, each option checked by itself and what is left open decided for this machine.

    Raises:
        ConfigError: as `check`.
    """
    values = read_options(config, Options.__dataclass_fields__)
    for option, overridden in (("test_ratio", "missing_ratio"), ("test_type", "missing_type")):
        if values[option] is not None:
            values[overridden] |= {"val": values[option], "test": values[option]}
    if values["val_check_interval"] is None:
        by_method = PUBLISHED_INTERVALS.get(values["task"], {})
        values["val_check_interval"] = by_method.get(values["prompt_type"], by_method.get(None, 0.2))
    _settle_machine(values)
    return Options(**values)


def read_options(config: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """The options `names`, each checked by itself. Raises ConfigError."""
    return {name: _reader(name)(name, config[name]) for name in names}


def read_with_machine(config: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """The options `names`, each checked by itself, with those of the machine as they fit it. Raises ConfigError."""
    values = read_options(config, [*names, "num_gpus", "num_workers", "precision"])
    _settle_machine(values)
    return values


def read_load_paths(config: Mapping[str, Any]) -> tuple[Path, ...]:
    """What `load_path` names where it may be several: checkpoints and folders of runs. Raises ConfigError."""
    if config["load_path"] in (None, ""):
        raise ConfigError(
            "load_path: expected a checkpoint, a list of them, or a folder of runs, as in load_path=result/…/best.ckpt"
        )
    return several(path)("load_path", config["load_path"])


def check_command_line(argv: Sequence[str]) -> None:
    """Checks what Sacred acts on before anything else is checked.

    Raises:
        ConfigError: `seed` is none (in a .json file too), a value cannot be read, a flag is none of FLAGS, or a file
            stands where a named config is expected that is no JSON: Sacred would read options from it, in ways that can
            run code.
        DataError: a .json file is not readable.
    """
    words = []
    for word in argv[1:]:
        if "seed" in (in_file := options_in_files([word])):
            SEED(f"{word}: seed", in_file["seed"])
        if word.startswith("-"):
            if not any(word == flag or (takes and word.startswith(flag)) for flag, takes in FLAGS.items()):
                raise ConfigError(f"{quoted(word)}: expected one of {', '.join(FLAGS)}, or name=value")
        elif "=" in word:
            words.append(word)
        elif _may_be_path(word) and Path(word).suffix != ".json" and Path(word).is_file():
            raise ConfigError(f"{word}: expected name=value, a named config, or a .json file, found another file")
    try:
        given = get_config_updates(words)[0]
        normalize_or_die(given)
    except (TypeError, LookupError, RecursionError, MemoryError) as error:
        raise ConfigError(f"expected name=value, found what is none: {first_line(error)}") from error
    if "seed" in given:
        SEED("seed", given["seed"])


def options_in_files(words: Sequence[str]) -> dict[str, Any]:
    """What the .json files among the words of a command line set; raises ConfigError where one is damaged."""
    found: dict[str, Any] = {}
    for path in (Path(word) for word in words if "=" not in word and word.endswith(".json") and _may_be_path(word)):
        if not path.is_file():
            continue
        try:
            read = json.loads(path.read_text("utf-8"))
        except (ValueError, RecursionError, OSError) as error:
            raise ConfigError(f"{path}: expected options as JSON: {first_line(error)}") from error
        if not isinstance(read, dict):
            raise ConfigError(f"{path}: expected an object with options, found {quoted(read)}")
        found |= read
    return found


def unknown_option(names: list[str], config_names: list[str]) -> ConfigError:
    """The error for options that do not exist, with the nearest that do."""
    told = []
    for name in names:
        near = difflib.get_close_matches(name, config_names, n=1, cutoff=0.6)
        told.append(f"unknown option {name}" + (f"; did you mean {near[0]}?" if near else ""))
    return ConfigError("; ".join(told) + " (`python run.py print_config` shows all)")


def _reader(option: str) -> Reader:
    reader: Reader = get_args(_hints()[option])[1]
    return reader


@cache
def _hints() -> dict[str, Any]:
    return get_type_hints(Options, include_extras=True)


def _settle_machine(values: dict[str, Any]) -> None:
    """Checks num_gpus, num_workers and precision against the machine, and fills in what is left to it."""
    gpus = torch.cuda.device_count()
    if values["num_gpus"] is None:
        values["num_gpus"] = min(1, gpus)
    if values["num_gpus"] > gpus:
        remedy = "; leave num_gpus out to run on the CPU" if gpus == 0 else ""
        raise ConfigError(f"num_gpus: expected at most the {gpus} of this machine, found {values['num_gpus']}{remedy}")
    values["num_workers"] = min(values["num_workers"], len(os.sched_getaffinity(0)))
    values["precision"] = _fitting_precision(values["precision"], on_gpu=values["num_gpus"] > 0)


def _fitting_precision(precision: str | None, on_gpu: bool) -> str:
    if precision == PUBLISHED:
        return PRECISIONS["16" if on_gpu else "32"]
    if on_gpu:
        if precision is None:
            return PRECISIONS["bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "16"]
        return precision
    if precision == PRECISIONS["16"]:
        raise ConfigError("precision: expected 32 or bf16, found 16, which a CPU cannot compute in")
    return precision or PRECISIONS["bf16" if torch.cpu._is_avx512_bf16_supported() else "32"]


def check_together(options: Options) -> None:
    """Raises ConfigError where options contradict each other, or name checkpoints that are not there."""
    if options.task is None:
        names = ", ".join(f"task_finetune_{name}" for name in TASK_NAMES)
        raise ConfigError(f"no task: expected one of {names}, as in `python run.py with task_finetune_mmimdb …`")
    if options.memory_length % 3:
        raise ConfigError(
            f"memory_length: expected a positive multiple of 3 (private, shared and dynamic slots), "
            f"found {options.memory_length}"
        )
    _check_method(options)
    if options.cpu_processes > 1 and options.num_gpus:
        raise ConfigError(f"cpu_processes: expected 1 where GPUs are used (num_gpus={options.num_gpus})")
    if options.end_lr >= options.learning_rate:
        raise ConfigError(
            f"end_lr: expected less than learning_rate={options.learning_rate:g}, found {options.end_lr:g}"
        )
    if options.test_only and options.load_path is None:
        raise ConfigError("test_only: expected a checkpoint to evaluate, as in load_path=result/…/best.ckpt")
    if options.finetune_first and options.load_path is None:
        raise ConfigError("finetune_first: expected a checkpoint to start from in load_path")
    if options.resume_from is not None and options.test_only:
        raise ConfigError("resume_from: goes on with a training run; test_only contradicts it")
    for name, checkpoint in (("load_path", options.load_path), ("resume_from", options.resume_from)):
        if checkpoint not in (None, AUTO) and not Path(checkpoint).is_file():
            raise ConfigError(f"{name}: expected a checkpoint file, found nothing at {checkpoint}")


def _check_method(options: Options) -> None:
    plain, names = MethodOptions(), ("far", "fmb", "replay_depth", "decoupling_weight", "dynamic_init")
    of_rep = {name: getattr(options, name) for name in names}
    for name, value in of_rep.items():
        if value != getattr(plain, name) and options.prompt_type != "rep":
            raise ConfigError(f"{name}: is an option of prompt_type=rep, found prompt_type={options.prompt_type}")
    for name, needed in (("replay_depth", "far"), ("decoupling_weight", "fmb"), ("dynamic_init", "fmb")):
        if of_rep[name] and not of_rep[needed]:
            raise ConfigError(f"{name}: expected {getattr(plain, name)} with {needed}=False, found {of_rep[name]}")
    if options.prompt_type == "map_attention" and options.memory_length % 2:
        raise ConfigError(
            f"memory_length: expected a multiple of 6 (a third of it is keys and values), found {options.memory_length}"
        )


def _check_data_and_weights(options: Options) -> None:
    if options.data_root is None:
        raise ConfigError("data_root: expected the folder of the arrow files that make_arrow.py wrote, found nothing")
    spec = EVERY_DATASET[options.task]
    missing = [
        spec.file_name(split) for split in options.splits if not (options.data_root / spec.file_name(split)).is_file()
    ]
    if missing:
        raise ConfigError(
            f"data_root: expected {', '.join(missing)} in {options.data_root}, found "
            f"{'no such folder' if not options.data_root.is_dir() else 'no such file'}; "
            + spec.how_to_make(options.data_root)
        )
    known = options.vit in HUB_NAMES or Path(options.vit).exists() or options.vit.startswith(("RN", "ViT-"))
    if not known:
        raise ConfigError(
            f"vit: expected one of {', '.join(HUB_NAMES)}, a Hugging Face folder or a weights file, "
            f"found {options.vit!r}"
        )
