"""The table of options, which defines defaults, checks, the output of `print_config`, and what a sweep may vary.

Nothing here imports torch, so `print_config` and complaints about a wrong option are instant.
"""

from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clip.modules.registry import HEADS, METHODS, PRETRAINING, every_method
from common.readers import (
    Reader,
    by_key,
    dictionary,
    flag,
    folder_name,
    gpus,
    integer,
    interval,
    number,
    of_each,
    one_of,
    one_or_several,
    optional,
    path,
    path_or_name,
    several,
    warmup,
    word_or,
)
from runs.option_readers import (
    MISSING_TYPES,
    MissingTypeReader,
    logging_service,
    precision_name,
    sort_order,
    split_name,
    task_name,
)
from vilt.datasets.specs import EVERY_DATASET, SPLITS, Split
from vilt.missing_tables import DRAWINGS, PUBLISHED, MissingPattern
from vilt.missing_types import ANY, BOTH

if TYPE_CHECKING:
    from clip.modules.method import MethodOptions
    from engine.optimization import OptimizerSettings
    from vilt.datamodules import DataSettings

AUTO = "auto"
BOTH_EVERYWHERE = dict.fromkeys(SPLITS, BOTH)
SEED = integer(0, 2**32 - 1)
"""Reads a seed in the range that NumPy and Lightning accept."""

# The table

DATA, MODEL, TRAINING, MACHINE, RUN, COMMAND = "data", "model", "training", "machine", "run", "command"
KINDS = {
    DATA: "Data and missing modalities",
    MODEL: "Model",
    TRAINING: "Training",
    MACHINE: "Machine and paths",
    RUN: "Run",
    COMMAND: "Other commands",
}
"""Heading of each kind of option. Sweeps and searches vary options of kind MODEL and TRAINING; a resumed run must keep
them, and the data."""


@dataclass(frozen=True)
class Option:
    """Default, reader, kind and help text of an option."""

    default: Any
    read: Reader
    kind: str
    help: str


def option(default: Any, read: Reader, kind: str, text: str) -> Any:
    """Declares a field of `Options`."""
    return field(metadata={"option": Option(default, read, kind, text)})


# fmt: off
@dataclass(frozen=True)
class Options:
    """The checked options; each field declares its default, reader, kind and help text."""

    exp_name: str = option("rep", folder_name, RUN, "name of the run's folder")
    seed: int = option(0, SEED, DATA, "seed of initial memory, sample order, dropout and missing tables")
    task: str = option(
        None, optional(task_name), DATA, "dataset, set by task_finetune_mmimdb, …_food101, …_mosi, …, task_pretrain_…")

    data_root: Path = option("", optional(path), MACHINE, "folder of the arrow files written by make_arrow.py")
    missing_ratio: dict[Split, float] = option(
        dict.fromkeys(SPLITS, 0.7), by_key(SPLITS, number(0, 1)), DATA,
        "share of samples that lose a modality; a single number sets all splits")
    missing_type: dict[Split, str] = option(
        BOTH_EVERYWHERE, MissingTypeReader(partial(by_key, SPLITS), BOTH_EVERYWHERE, ANY), DATA,
        "a modality, or both; of three or more: several (text+audio), any (one) or some; one word sets all splits")
    both_ratio: float = option(
        0.5, number(0, 1), DATA,
        "with type both: share of incomplete samples that lose the first modality (image, seismic), not the second")
    missing_table_root: Path = option("datasets/missing_tables", path, MACHINE, "folder of the missing tables")
    missing_tables: str = option("nested", one_of(*DRAWINGS), DATA, "how missing tables are drawn: nested or published")
    order_seed: int | None = option(None, optional(SEED), DATA, "seed of the order of training samples; None: seed")
    simulate_missing: bool = option(
        False, flag, TRAINING, "in training, complete samples also lose a random modality, redrawn each epoch; "
        "text, audio and vision: all losses are redrawn each epoch, without a missing table")
    label_ratio: float = option(
        1, number(0, 1, above=True), TRAINING, "share of the labelled training samples that training uses")
    modality_dropout: float = option(
        0, number(0, 1), TRAINING, "in training, probability that a sample loses further modalities")
    num_workers: int = option(8, integer(0), MACHINE, "loader workers; at most one per core")
    image_cache: bool = option(False, flag, MACHINE, "cache decoded images next to the arrow files, for slow CPUs")

    vit: str = option("ViT-B/16", path_or_name, MODEL,
        "CLIP weights: ViT-B/32, ViT-B/16, ViT-L/14, ViT-L/14@336px, a Hugging Face folder, or a file")
    network: dict[str, Any] = option(
        None, dictionary, MODEL, "sensors; text, audio and vision: sizes of the backbone, such as network.width=64")
    vit_activation: str | None = option(
        None, optional(one_of("quick_gelu", "gelu")), MODEL, "activation of an open_clip state dict, which lacks it")
    tokenizer: str | None = option(None, optional(path_or_name), MODEL,
        "Hugging Face folder or name, or CLIP's merges file; None: that of vit")
    trust_backbone: bool = option(
        False, flag, MACHINE, "open a TorchScript archive (which can run code) that is not one of OpenAI's")
    prompt_type: str = option(
        "rep", lambda name, value: one_of(*every_method())(name, value), MODEL, f"the method: {', '.join(METHODS)}"
    )
    memory_length: int = option(36, integer(3), MODEL, "memory slots: a third each private, shared and dynamic")
    memory_depth: int = option(6, integer(1), MODEL,
        "blocks of each tower that get private slots; default: 6; in shallow backbones and for sensors, half of all")
    head: str = option("linear", one_of(*HEADS), MODEL, "linear, linear_by_type (one per missing type), or dpl")
    text_windows: int = option(1, integer(1), MODEL,
        "images and texts: maximum number of 75-token windows per text; the head gets their mean and maximum")
    group_texts: bool = option(False, flag, MODEL, "with text_windows: treat all texts of a row as one sample")
    train_ends: bool | None = option(
        None, optional(flag), MODEL, "train final norms and image projection; None: as published for method and head")
    neighbours: int = option(
        0, integer(0), MODEL, "with prompt_type=none: nearest training samples that inform the head")
    dpl_margins: tuple[float, ...] = option(
        0.1, of_each(3, number(0, 1.5)), MODEL, "dpl: margin in radians, or three (complete, text, image missing)")
    dpl_contrast_weight: float = option(0, number(0), MODEL, "dpl: weight of the contrastive loss between prototypes")
    lora_matrices: str = option("qk", one_of("qk", "qv", "kv"), MODEL, "mora, lora: which two of q, k, v are adapted")
    lora_rank: tuple[int, ...] = option(
        4, of_each(3, integer(1)), MODEL, "mora, lora: rank, or three: shared update, image tower, text tower")
    lora_alpha: float = option(0.001, number(0), MODEL, "mora, lora: factor on the updates")
    aoept_prototypes: int = option(256, integer(1), MODEL, "aoept: clusters of the training set per tower and block")
    aoept_weight: float = option(0.05, number(0), MODEL, "aoept: weight of its auxiliary loss")
    aoept_read: str = option("published", one_of("published", "end"), MODEL,
        "aoept: read-out position of a text: the last of 77 (published) or its end token (end)")
    far: bool = option(True, flag, MODEL, "REP: residual bypass, and replay if replay_depth is above 0")
    fmb: bool = option(True, flag, MODEL, "REP: private slots per missing type, and shared slots")
    replay_depth: int = option(0, integer(0), MODEL, "REP as described: deeper blocks that replay early outputs")
    decoupling_weight: float = option(
        0, number(0), MODEL, "REP as described: weight of the loss that keeps private and shared slots apart")
    dynamic_init: bool = option(False, flag, MODEL, "REP as described: initialise shared slots from the sample too")
    rdn_hidden: int = option(32, integer(1), MODEL, "text, audio and vision: hidden width of REP's projections")
    mask_readout: bool = option(False, flag, MODEL, "text, audio and vision: zero the read-out of a missing modality")
    train_pooler: bool = option(False, flag, MODEL, "text, audio and vision: REP trains the pooler too")
    prompt_length: int = option(16, integer(1), MODEL, "MPLMM: length of a prompt in steps (dcp, rep: memory_length)")
    image_size: int | None = option(None, optional(integer(1)), MACHINE, "side of the images; None: the backbone's")

    batch_size: int = option(256, integer(1), TRAINING, "effective batch size, reached by accumulation")
    per_gpu_batchsize: int = option(32, integer(1), TRAINING, "samples per process and forward pass")
    optim_type: str = option("adamw", one_of("adamw", "adam", "sgd"), TRAINING,
        "optimiser: adamw (as in transformers 4.2.1), adam or sgd")
    learning_rate: float = option(1e-2, number(0, above=True), TRAINING, "learning rate at the end of the warm-up")
    lr_mult: float = option(1, number(0, above=True), TRAINING, "factor on the learning rate of the head")
    weight_decay: float = option(2e-2, number(0), TRAINING, "weight decay; biases and the norms inside RDNs have none")
    clip_gradient: float = option(0, number(0), TRAINING, "largest gradient norm; 0: no clipping")
    max_epoch: int = option(20, integer(1), TRAINING, "number of epochs")
    max_steps: int | None = option(
        None, optional(integer(1)), TRAINING, "number of optimiser steps; None: as many as max_epoch takes")
    warmup_steps: float = option(0.1, warmup, TRAINING, "optimiser steps of linear warm-up, or their share if below 1")
    decay_power: float | str = option(
        1, word_or("cosine", word_or("step", word_or("plateau", number(0, above=True)))), TRAINING,
        "power of polynomial decay, cosine, step (a fifth of the rate after each fifth of the training), or plateau (a "
        "tenth after 10 validations without a lower loss)")
    end_lr: float = option(0, number(0), TRAINING, "learning rate at the last step")
    val_check_interval: int | float = option(None, optional(interval), TRAINING,
        "epochs between validations, or batches if above 1; None: 0.2; Hateful Memes: 0.1, 0.11 with DCP")
    precision: str = option(None, optional(precision_name), TRAINING,
        "32, 16, bf16, or published (16 on a GPU); None: for a checkpoint the precision of its training, else bf16 "
        "if the hardware has it, else 16 on a GPU")
    skip_bad_steps: int = option(20, integer(0), TRAINING, "with precision=16: maximum overflow steps skipped in a row")

    num_gpus: int = option(
        None, optional(gpus), MACHINE, "GPUs per node, or a list such as [0]; None: 1 if available, else 0 (the CPU)")
    num_nodes: int = option(1, integer(1), MACHINE, "number of machines")
    cpu_processes: int = option(1, integer(1), MACHINE, "number of processes when no GPU is used")
    cuda_graphs: bool = option(
        True, flag, MACHINE, "on a GPU, capture CLIP's steps and evaluations as CUDA graphs, one per shape")
    activation_checkpointing: bool = option(False, flag, MACHINE, "save memory at the cost of a second forward pass")

    log_dir: Path = option("result", path, RUN, "folder for all run folders")
    load_path: Path | tuple[Path, ...] | None = option(
        "", optional(one_or_several(path)), TRAINING,
        "checkpoint to evaluate (test_only) or to warm-start from; several are evaluated as one, by mean logits")
    published_seed: int = option(
        0, SEED, TRAINING, "seed of the run that wrote a published checkpoint, to draw its dynamic queries")
    teacher: Path | None = option(
        None, optional(path), TRAINING, "checkpoint whose predicted probabilities are half of the training target")
    finetune_first: bool = option(False, flag, TRAINING, "a warm start loads the head too (same task only)")
    resume_from: Path | str | None = option(
        None, optional(word_or(AUTO, path)), RUN, "`last.ckpt` of an interrupted run to resume; auto: find it")
    logger: str | None = option(
        None, optional(logging_service), RUN, "wandb or mlflow: log options and metrics there too, besides TensorBoard")
    fast_dev_run: bool = option(False, flag, RUN, "run one batch of everything and write nothing")
    test_after_fit: bool = option(True, flag, RUN, "evaluate the best checkpoint on the test split after training")
    test_only: bool = option(False, flag, RUN, "evaluate load_path on the test split")
    test_ratio: float | None = option(None, optional(number(0, 1)), RUN, "missing ratio of validation and test")
    test_type: str | None = option(
        None, MissingTypeReader(optional), RUN, "missing type of validation and test")
    test_exp_name: str | None = option(None, optional(folder_name), RUN, "folder name of a test_only run")

    robustness_types: tuple[str, ...] = option(
        MISSING_TYPES, MissingTypeReader(several, MISSING_TYPES), COMMAND, "robustness, compare: missing types")
    robustness_ratios: tuple[float, ...] = option(
        [tenths / 10 for tenths in range(11)], several(number(0, 1)), COMMAND,
        "robustness, compare: missing ratios; default of compare: 0, 1 and the ratio of the training")
    robustness_both_ratios: tuple[float, ...] | None = option(
        None, optional(several(number(0, 1))), COMMAND, "robustness: values of both_ratio; None: only both_ratio")
    robustness_seeds: tuple[int, ...] = option(
        [0, 1, 2, 3, 4], several(SEED), COMMAND, "robustness, compare: seeds of the missing tables")
    published_f1: bool = option(
        False, flag, RUN, "text, audio and vision: also report F1 weighted by prediction, as MPLMM's code does")
    bootstrap: int = option(
        1000, integer(0), COMMAND, "robustness, compare: resamples for intervals; 0 (robustness only): no intervals")
    permutations: int = option(10_000, integer(1), COMMAND, "compare: maximum number of permutations for a p-value")
    runs_sort: str = option("date", sort_order, COMMAND, "runs: column to sort by, in reverse with a minus (-date)")
    input: Path | None = option(
        None, optional(path), COMMAND,
        "predict, embed: table with image, text and optionally id, or a folder of images and texts")
    split: Split | None = option(
        None, optional(split_name), COMMAND,
        "embed: split of data_root, instead of input; as stored unless missing_ratio is given")
    output: Path | None = option(None, optional(path), COMMAND,
        "predict, embed: output file (.csv, .jsonl; .npz, .safetensors); None: predictions.csv, features.npz")
    runs: tuple[Path, ...] = option(
        "result", several(path, texts=True), COMMAND, "report, compare: run folders, or folders of them")
    out: Path | None = option(
        None, optional(path), COMMAND, "report, export: output folder; None: report, or export next to load_path")

    sweep_name: str = option("sweep", folder_name, COMMAND, "sweep: name of its folder in log_dir")
    sweep_types: tuple[str, ...] = option(
        MISSING_TYPES, MissingTypeReader(several, MISSING_TYPES), COMMAND,
        "sweep: missing types, each for both training and test")
    sweep_ratios: tuple[float, ...] = option([0.5, 0.7, 0.9], several(number(0, 1)), COMMAND, "sweep: missing ratios")
    sweep_seeds: tuple[int, ...] = option([0, 1, 2], several(SEED), COMMAND, "sweep: seeds")
    sweep_over: dict[str, tuple[Any, ...]] = option(
        None, dictionary, COMMAND, "sweep: further options to vary, such as sweep_over.memory_depth=[3,6]")
    sweep_launcher: str = option("local", one_of("local", "slurm", "submitit_local", "commands"), COMMAND,
        "sweep: local, slurm, submitit_local (as on SLURM, but here), or commands (just a list)")
    sweep_parallel: int = option(1, integer(1), COMMAND, "sweep: number of concurrent runs with sweep_launcher=local")
    sweep_slurm: dict[str, Any] = option(
        None, dictionary, COMMAND, "sweep: parameters for submitit, such as sweep_slurm.partition=gpu")
    search: dict[str, tuple[Any, ...]] = option(
        None, dictionary, COMMAND, "sweep: options to search, not a grid: search.learning_rate=[1e-4,1e-1]")
    search_trials: int = option(20, integer(1), COMMAND, "sweep: number of complete trials after which a search ends")
    # fmt: on

    @property
    def processes(self) -> int:
        """Number of processes on all nodes together."""
        return self.num_nodes * (self.num_gpus or self.cpu_processes)

    @property
    def accumulation(self) -> int:
        """Forward passes per optimiser step, rounded down as published."""
        return max(1, self.batch_size // (self.per_gpu_batchsize * self.processes))

    @property
    def splits(self) -> tuple[Split, ...]:
        """The splits that this run reads."""
        if self.test_only:
            return ("test",)
        return SPLITS if self.test_after_fit and not self.fast_dev_run else ("train", "val")

    @property
    def load_paths(self) -> tuple[Path, ...]:
        """The checkpoints named by `load_path`."""
        return self.load_path if isinstance(self.load_path, tuple) else (self.load_path,) if self.load_path else ()

    def pattern(self, split: Split) -> MissingPattern:
        """The missing pattern of a split."""
        of_split = (self.missing_type[split], self.missing_ratio[split], self.both_ratio)
        return MissingPattern(*of_split, self.seed, self.missing_tables)

    def robustness_patterns(self) -> list[list[MissingPattern]]:
        """The cells of a robustness matrix; each lists its missing pattern with every table seed."""
        both_ratios = {BOTH: self.robustness_both_ratios or (self.both_ratio,)}  # the other types do not depend on it
        return [
            [MissingPattern(kind, ratio, both, seed, self.missing_tables) for seed in self.robustness_seeds]
            for kind in self.robustness_types
            for both in both_ratios.get(kind, (self.both_ratio,))
            for ratio in self.robustness_ratios
        ]

    def method(self) -> "MethodOptions":
        """The options that define the slots of the towers."""
        from clip.modules.method import MethodOptions

        return MethodOptions(**{each.name: getattr(self, each.name) for each in fields(MethodOptions)})

    def data_settings(self) -> "DataSettings":
        """The options that the loaders need."""
        from vilt.datamodules import DataSettings

        order_seed = self.seed if self.order_seed is None else self.order_seed
        given: dict[str, Any] = {
            "dataset": self.task,
            "patterns": {split: self.pattern(split) for split in SPLITS},
            "order_seed": order_seed,
            "subsequence": PRETRAINING.get(self.prompt_type, 1),
        }
        names = [each.name for each in fields(DataSettings)]
        return DataSettings(**{name: given[name] if name in given else getattr(self, name) for name in names})

    def optimizer_settings(self) -> "OptimizerSettings":
        """The options that the optimiser needs."""
        from engine.optimization import OptimizerSettings

        return OptimizerSettings(**{each.name: getattr(self, each.name) for each in fields(OptimizerSettings)})


OPTIONS: dict[str, Option] = {each.name: each.metadata["option"] for each in fields(Options)}
DEFAULTS: dict[str, Any] = {name: each.default for name, each in OPTIONS.items()}
NAMED_CONFIGS: dict[str, dict[str, Any]] = {
    **{
        f"task_finetune_{name}": {"exp_name": f"finetune_{name}", "task": name, **spec.options}
        for name, spec in EVERY_DATASET.items()
    },
    **{
        f"task_pretrain_{name}": {"exp_name": f"pretrain_{name}", "task": name, **spec.options, **spec.pretraining}
        for name, spec in EVERY_DATASET.items()
        if spec.pretraining
    },
    "supervised": {
        "prompt_type": "full", "max_epoch": 500, "learning_rate": 1e-4, "weight_decay": 0.05, "end_lr": 1e-7,
    },
    "published": {"missing_tables": PUBLISHED, "order_seed": 0, "precision": PUBLISHED},
    "rep_described": {"replay_depth": 6, "decoupling_weight": 0.1, "dynamic_init": True},
    "mmimdb_best": {"prompt_type": "none", "text_windows": 8, "neighbours": 16},
    "ablation": {"sweep_over": {"far": [False, True], "fmb": [False, True]}},
}
