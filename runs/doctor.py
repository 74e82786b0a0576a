"""`run.py doctor`: checks, before a long run, that everything it needs is present, intact and fast enough.

Every check is made, whatever the others find. Most go through the readers that the run itself uses. The only files
written are the token ids and missing tables, which the run would write too.
"""

import importlib.metadata
import json
import logging
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from packaging.requirements import Requirement
from rich import filesize

from clip.backbone import FrozenWeights
from clip.tokenizer import ClipTokenizer
from common.errors import CheckupError, ConfigError, DataError, UserError
from common.messages import listed, quoted
from common.text import counted, per_cent
from config import Options
from engine.families import family_of
from runs.check_options import check_together, resolve
from runs.evaluation import backbone_choice, check_samples
from runs.start import remark_on_validation, remarks, samples_of_epoch
from runs.training import starting_point, train_from
from vilt.datamodules import split_patterns
from vilt.datasets.arrow_dataset import ArrowDataset
from vilt.datasets.custom import CUSTOM
from vilt.datasets.kinds import InputFormat
from vilt.datasets.open_spec import open_spec
from vilt.datasets.specs import Split
from vilt.missing_tables import counts_text, load_missing_table, type_counts

REQUIREMENTS = Path(__file__).parents[1] / "requirements.txt"
SHARED_MEMORY, IMAGES_DECODED = Path("/dev/shm"), 64  # images of each split, evenly spread
Found = tuple[str, str]
"""A level and a message. `FAIL`: the run would stop or give wrong results; `warn`: worth a look; else `ok`."""


def check_all(config: Mapping[str, Any], given: set[str]) -> None:
    """Prints a line for each check. Takes the arguments of a run. Raises CheckupError if a check failed."""
    logging.disable(logging.INFO)
    levels = []
    for level, line in examine(config, given):
        print(line, flush=True)
        levels.append(level)
    if failed := levels.count("FAIL"):
        raise CheckupError(f"{failed} of {len(levels)} checks failed")


def examine(config: Mapping[str, Any], given: set[str]) -> Iterator[Found]:
    """Yields the level and line of each check as soon as it is made. Raises ConfigError for an invalid option."""
    doctor = Doctor(resolve(config), given)
    checks: dict[str, Callable[[], Found]] = {
        "packages": check_packages,
        "options": doctor.check_options,
        "device": doctor.check_device,
        "backbone": doctor.check_backbone,
        "tokenizer": doctor.check_tokenizer,
        **{f"{split} data": partial(doctor.check_split, split) for split in doctor.options.splits},
        "training step": doctor.check_step,
        "storage": doctor.check_storage,
    }
    for subject, check in checks.items():
        try:
            level, text = check()
        except Exception as error:
            level, text = "FAIL", str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        yield level, " ".join(f"{level:<5}{subject}: {text}".splitlines())


def check_packages() -> Found:
    """Compares the installed versions with requirements.txt."""
    lines = [line for line in REQUIREMENTS.read_text("utf-8").splitlines() if not line.startswith("#")]
    found = {one: importlib.metadata.version(one.name) for one in map(Requirement, lines)}
    others = [f"{one.name} {version} (tested: {one})" for one, version in found.items() if version not in one.specifier]
    text = f"untested versions: {', '.join(others)}" if others else f"as in {REQUIREMENTS.name}"
    return "warn" if others else "ok", f"Python {platform.python_version()}, torch {torch.__version__}; {text}"


class StepTimer(pl.Callback):
    """Records loss, seconds and trained bytes of the latest training step."""

    loss, seconds, began, trained_bytes = 0.0, 0.0, 0.0, 0

    def on_train_batch_start(self, *_: Any) -> None:
        self.began = time.perf_counter()

    def on_train_batch_end(self, _: Any, module: Any, outputs: Any, *__: Any) -> None:
        self.loss = outputs["loss"].item()  # waits for the GPU
        self.seconds = time.perf_counter() - self.began
        self.trained_bytes = sum(p.nbytes for p in module.parameters() if p.requires_grad)


@dataclass
class Doctor:
    """The checks that need the options; later ones use the findings of earlier ones."""

    options: Options
    given: set[str]
    backbone: FrozenWeights | None = None
    inputs: InputFormat | None = None
    datasets: dict[Split, ArrowDataset] = field(default_factory=dict)
    agree: bool = False  # whether the options were checked and do not contradict each other
    run_bytes: int = 2**30  # size of the run folder in the end; a guess until the training step has run

    def __post_init__(self) -> None:
        self.family = family_of(self.options.task or CUSTOM)
        self.choice = backbone_choice(self.options, {"vit"})._replace(image_size=None)  # see the training step

    @property
    def image_size(self) -> int:
        """Side of the images in pixels."""
        return (self.inputs or InputFormat()).image_size

    def check_options(self) -> Found:
        check_together(self.options)
        self.agree = True
        return "ok", f"{counted(self.options.batch_size, 'sample')} a step, {counted(self.options.max_epoch, 'epoch')}"

    def check_device(self) -> Found:
        if not self.options.num_gpus:
            threads = counted(torch.get_num_threads(), "thread")
            return "warn", f"no GPU in use, {threads}: training as published takes days"
        free, total = torch.cuda.mem_get_info()
        memory = f"{filesize.decimal(free)} of {filesize.decimal(total)} free"
        device = f"{self.options.num_gpus} × {torch.cuda.get_device_name()}, {memory}"
        return "ok" if free > total / 2 else "warn", device

    def check_backbone(self) -> Found:
        options, trained_on = self.options, None
        if options.task is not None:
            options, _, trained_on = starting_point(options, self.given)
        self.choice = self.choice._replace(vit=options.vit, tokenizer=options.tokenizer)
        self.backbone = backbone = self.family.load(self.choice, trained_on)
        parameters = f"{sum(tensor.numel() for tensor in backbone.state.values()):,} parameters, all finite"
        return "ok", f"{options.vit}: {parameters}; sha256 {backbone.sha256[:16]}"

    def check_tokenizer(self) -> Found:
        self.inputs = self.family.inputs(self.choice, self.backbone.architecture if self.backbone else None)
        tokenize = self.inputs.tokenize
        return "ok", f"{tokenize.vocab_size:,} ids" if isinstance(tokenize, ClipTokenizer) else "not needed"

    def check_split(self, split: Split) -> Found:
        """Checks a split's arrow file, classes, size, texts and missing table, and some of its images."""
        options, root = self.options, self.options.data_root
        if options.task is None or root is None:
            raise ConfigError("expected a task and data_root, as in task_finetune_mmimdb data_root=datasets/mmimdb")
        spec = open_spec(options.task, root, options.splits)
        data = ArrowDataset(spec, root, split, self.image_size)
        names = list(data.class_names())
        stored = json.loads((data.table.schema.metadata or {}).get(b"class_names", b"null"))
        if stored not in (None, names):
            raise DataError(f"{data.path}: metadata class_names: expected {listed(names)}, found {quoted(stored)}")
        for index in np.unique(np.linspace(0, len(data) - 1, IMAGES_DECODED, dtype=int)).tolist():
            data[0, index]  # raises DataError if the image cannot be decoded
        pattern = split_patterns(options.data_settings().patterns, spec, root)[split]
        root = options.missing_table_root
        data.missing_table = load_missing_table(root, spec.table_name, split, pattern, data.n_rows)
        if split == "train":
            data.choose(options.label_ratio, options.seed)
        check_samples(options, split, data)
        what = " (one per text)" if spec.column_of("text") else ""
        facts = [f"{counted(data.n_rows, 'row')}, {counted(len(data), 'sample')}{what}"]
        if split == "train" and spec.redrawn and options.simulate_missing:
            facts.append(f"{per_cent(pattern.ratio)} {pattern.missing_type} missing, redrawn in each epoch")
        else:
            facts += counts_text(type_counts(data.missing_table, spec.type_names))
        remarks = []
        if data.n_rows not in (published := spec.published_rows.get(split, (data.n_rows,))):
            remarks.append(f"the published split has {' or '.join(f'{rows:,}' for rows in published)} rows")
        if absent := data.absent_classes():
            remarks.append(f"{len(absent)} of {len(names)} classes do not occur: {listed(absent)}")
        if split == "val" and (remark := remark_on_validation(data)):
            remarks.append(remark)
        if self.inputs is not None and self.inputs.tokenize is not None:
            data.tokenize(self.inputs.tokenize, self.inputs.fingerprint)
        self.datasets[split] = data
        return "warn" if remarks else "ok", "; ".join([", ".join(facts), *remarks])

    def check_step(self) -> Found:
        """Runs two training steps on real samples, the second of them timed, and a validation."""
        if not self.agree:
            return "warn", "not tried, since the options contradict each other"
        options, train = self.options, self.datasets.get("train")
        if self.backbone is None or self.inputs is None or train is None or "val" not in self.datasets:
            return "warn", "not tried, since it needs backbone, tokenizer, train data and val data"
        single = {"num_gpus": min(1, options.num_gpus), "num_nodes": 1, "cpu_processes": 1, "num_workers": 0}
        short = {"fast_dev_run": 2, "batch_size": options.per_gpu_batchsize, "image_cache": False, "resume_from": None}
        timer, changes = StepTimer(), dict[str, Any](single | short)
        train_from(replace(options, **changes), options.exp_name, timer, given=self.given)
        self.run_bytes = 9 * timer.trained_bytes  # best.ckpt; old and new last.ckpt, each with that and AdamW's state
        began, batch = time.perf_counter(), min(options.per_gpu_batchsize, len(train))
        train.__getitems__([(0, index) for index in range(batch)])
        loading = time.perf_counter() - began
        speed = f"{timer.seconds:.2f} s to train on {counted(batch, 'sample')}, {loading:.2f} s to load them"
        speed += f", peak memory {filesize.decimal(torch.cuda.max_memory_allocated())}" if options.num_gpus else ""
        slow = loading / max(1, options.num_workers) > timer.seconds
        hints = ["loading is slower than training (image_cache=True keeps decoded images)"] if slow else []
        hints += remarks(options, train.spec, samples_of_epoch(options, train))
        return "warn" if hints else "ok", "; ".join([f"loss {timer.loss:.4f}", speed, *hints])

    def check_storage(self) -> Found:
        """Checks permissions and space where the run writes, and in shared memory, where workers put batches."""
        options = self.options
        # Each worker keeps two batches there, and the workers of training and validation exist at the same time.
        workers = 2 * (options.num_gpus or options.cpu_processes) * options.num_workers
        batches = 2 * workers * options.per_gpu_batchsize * 3 * self.image_size**2
        needs, texts = [(options.log_dir, self.run_bytes), (SHARED_MEMORY, batches)], []
        if options.image_cache and options.data_root:
            needs.append((options.data_root, 0))  # the cache checks its own space as soon as the run starts
        for path, needed in needs:
            folder = next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
            if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
                raise DataError(f"{path}: expected a folder that can be written to or created")
            free = shutil.disk_usage(folder).free
            texts.append(f"{path}: {filesize.decimal(free)} free, about {filesize.decimal(needed)} needed")
            if free < needed:
                raise DataError(texts[-1])
        return "ok", "; ".join(texts)
