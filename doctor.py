"""`run.py doctor`: looks, before a long run, whether all that it needs is there, whole, and fast enough.

Every check is made, whatever the others find. Nothing is written but the token ids beside the arrow files, which a run
would make too.
"""

import importlib.metadata
import math
import platform
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import AdamW

from clip.backbone import Backbone, load_backbone
from clip.checkpoint import ModelSpec, build_classifier, kept_state
from clip.modules.classifier import MissingModalityClassifier
from clip.tasks import task_of
from clip.tokenizer import ClipTokenizer
from clip.training import FinetuneModule
from common.errors import ConfigError
from config import Options
from constraints import read_requirements
from runs.check_options import check_together, resolve
from vilt.checkup import (
    Finding,
    check_file,
    check_images,
    check_labels,
    check_missing_table,
    check_rows,
    check_texts,
    guarded,
    is_writable,
    nearest_folder,
)
from vilt.datamodules import Batch, collate, split_patterns
from vilt.datasets.arrow_dataset import ArrowDataset
from vilt.datasets.open_spec import open_spec
from vilt.datasets.specs import Split
from vilt.image_cache import missing_bytes

OLDEST_PYTHON = (3, 11)
REQUIREMENTS = Path(__file__).with_name("requirements.txt")
SHARED_MEMORY = Path("/dev/shm")
CONTROL_GROUP = Path("/sys/fs/cgroup")
BATCHES_AHEAD = 2
"""Batches that each loader process keeps ready, in shared memory: torch's default."""
LOADER_BYTES = 300 * 2**20
"""Memory of a loader process, roughly."""
UNKNOWN_RUN_BYTES = 2**30
"""What a run may leave where the model could not be built and measured."""
CLIP_IMAGE_SIZE = 224
"""Where the backbone cannot be read and tell."""

TokenizerFor = Callable[[str | None, str, int], ClipTokenizer]
SetComputation = Callable[[Options, MissingModalityClassifier], None]


@dataclass(frozen=True)
class StepCost:
    """Seconds that one batch takes."""

    loading: float
    """In one loader process."""
    training: float
    evaluation: float


@dataclass
class Patient:
    """What is looked at, and what the checks so far have found of it."""

    options: Options
    tokenizer_for: TokenizerFor
    set_computation: SetComputation
    backbone: Backbone | None = None
    tokenizer: ClipTokenizer | None = None
    datasets: dict[Split, ArrowDataset] = field(default_factory=dict)
    run_bytes: int = UNKNOWN_RUN_BYTES
    """What a run leaves in its folder."""
    cost: StepCost | None = None


def examine(
    config: Mapping[str, Any], tokenizer_for: TokenizerFor, set_computation: SetComputation
) -> Iterator[Finding]:
    """All findings, each as soon as it is made.

    Args:
        config: Sacred's configuration.
        tokenizer_for, set_computation: run.py's.
    """
    yield from guarded("python", check_python)
    yield from guarded("packages", check_packages)
    try:
        options = resolve(config)
    except ConfigError as error:
        yield Finding("FAIL", "options", str(error))
        yield Finding("warn", "all else", "not looked at: it depends on the options")
        return
    patient = Patient(options, tokenizer_for, set_computation)
    for subject, check in CHECKS.items():
        yield from guarded(subject, lambda check=check: check(patient))  # type: ignore[misc]


def check_python() -> Iterator[Finding]:
    """The interpreter's version."""
    fine = sys.version_info >= OLDEST_PYTHON
    wanted = "" if fine else f"; expected {'.'.join(map(str, OLDEST_PYTHON))} or newer"
    yield Finding("ok" if fine else "FAIL", "python", f"{platform.python_version()} ({sys.executable}){wanted}")


def check_packages() -> Iterator[Finding]:
    """Installed versions beside those of requirements.txt."""
    requirements = list(read_requirements(REQUIREMENTS))
    others, absent = [], []
    for requirement in requirements:
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            absent.append(requirement.name)
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            others.append(f"{requirement.name} {version} (tested: {str(requirement.specifier).removeprefix('==')})")
    if absent:
        yield Finding("FAIL", "packages", f"not installed: {', '.join(absent)}; pip install -r {REQUIREMENTS.name}")
    if others:
        yield Finding("warn", "packages", f"other versions than {REQUIREMENTS.name} has: {', '.join(others)}")
    if not absent and not others:
        yield Finding("ok", "packages", f"all {len(requirements)} as in {REQUIREMENTS.name}")


def check_options(patient: Patient) -> Iterator[Finding]:
    """Whether the options go together."""
    options = patient.options
    check_together(options)
    passes = f"{options.accumulation} × {options.processes} × {options.per_gpu_batchsize} samples a step"
    yield Finding("ok", "options", f"go together; {passes}, {options.max_epoch} epochs, seed {options.seed}")


def check_device(patient: Patient) -> Iterator[Finding]:
    """What computes, and how precisely."""
    options = patient.options
    if options.num_gpus:
        free, total = torch.cuda.mem_get_info()
        said = f"{options.num_gpus} × {torch.cuda.get_device_name()}, {_size(free)} of {_size(total)} free"
        yield Finding("ok" if free > total / 2 else "warn", "device", f"{said}, precision {options.precision}")
    else:
        said = f"no GPU in use; {torch.get_num_threads()} threads, precision {options.precision}"
        yield Finding("warn", "device", f"{said}: a training of the published length takes days")


def check_backbone(patient: Patient) -> Iterator[Finding]:
    """CLIP's weights: found, whole, finite."""
    options = patient.options
    backbone = load_backbone(options.vit, trust=options.trust_backbone, activation=options.vit_activation)
    size = backbone.architecture.image_size
    if options.image_size not in (None, size):
        raise ConfigError(f"image_size: expected {size}, which is the backbone's, found {options.image_size}")
    patient.backbone = backbone
    values = sum(tensor.numel() for tensor in backbone.state.values())
    said = f"{options.vit}: {values:,} values, all finite; images of {size}; sha256 {backbone.sha256[:16]}…"
    yield Finding("ok", "backbone", said)


def check_tokenizer(patient: Patient) -> Iterator[Finding]:
    """The tokenizer, beside the backbone's embeddings where these are known."""
    options, backbone = patient.options, patient.backbone
    vocab_size = backbone.architecture.vocab_size if backbone is not None else sys.maxsize
    patient.tokenizer = patient.tokenizer_for(options.tokenizer, options.vit, vocab_size)
    said = f"{patient.tokenizer.vocab_size:,} ids; fingerprint {patient.tokenizer.fingerprint[:16]}…"
    yield Finding("ok", "tokenizer", said)


def check_data(patient: Patient) -> Iterator[Finding]:
    """Every split that a run would read."""
    options = patient.options
    if options.task is None or options.data_root is None:
        lacking = "task" if options.task is None else "data_root"
        raise ConfigError(
            f"not looked at: {lacking} is not given, as in task_finetune_mmimdb data_root=datasets/mmimdb"
        )
    for split in options.splits:
        yield from guarded(f"{split} file", lambda split=split: _check_split(patient, split))  # type: ignore[misc]


def _check_split(patient: Patient, split: Split) -> Iterator[Finding]:
    options = patient.options
    image_size = patient.backbone.architecture.image_size if patient.backbone is not None else CLIP_IMAGE_SIZE
    spec = open_spec(options.task, options.data_root, options.splits)
    dataset = ArrowDataset(spec, options.data_root, split, image_size)
    pattern = split_patterns(options.data_settings().patterns, spec, options.data_root)[split]

    def check_tokens() -> Iterator[Finding]:
        if patient.tokenizer is None:
            yield Finding("warn", f"{split} texts", "not looked at: there is no tokenizer")
            return
        dataset.tokenize(patient.tokenizer, patient.tokenizer.fingerprint)
        yield from check_texts(dataset)

    yield from guarded(f"{split} file", lambda: check_file(dataset))
    yield from guarded(f"{split} rows", lambda: check_rows(dataset))
    yield from guarded(f"{split} labels", lambda: check_labels(dataset))
    yield from guarded(f"{split} images", lambda: check_images(dataset))
    yield from guarded(f"{split} texts", check_tokens)
    yield from guarded(
        f"{split} missing table", lambda: check_missing_table(dataset, options.missing_table_root, pattern)
    )
    patient.datasets[split] = dataset


def check_step(patient: Patient) -> Iterator[Finding]:
    """One training step, twice, and one evaluation pass, on real samples; only the second step is timed."""
    options, backbone = patient.options, patient.backbone
    dataset = next(iter(patient.datasets.values()), None)
    if backbone is None or dataset is None or dataset.tokens is None:
        yield Finding("warn", "training step", "not tried: it needs backbone, tokenizer and dataset")
        return
    spec = ModelSpec(options.task, options.method(), backbone.architecture, options.head, dataset.spec.custom)
    task = task_of(spec.task, spec.custom)
    try:
        classifier = build_classifier(spec)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    backbone.load_into(classifier.model)
    patient.run_bytes = _run_bytes(classifier)
    patient.set_computation(options, classifier)
    device = torch.device("cuda" if options.num_gpus else "cpu")
    module = FinetuneModule(classifier, spec).to(device)

    chosen = np.random.default_rng(options.seed).permutation(len(dataset))[: options.per_gpu_batchsize]
    loading, batch = _timed(lambda: collate(dataset.__getitems__([(0, int(index)) for index in chosen])), device)
    on_device = Batch._make(part.to(device) if isinstance(part, Tensor) else part for part in batch)
    optimizer = AdamW([parameter for parameter in classifier.parameters() if parameter.requires_grad])
    mixed = torch.float16 if options.precision == "16-mixed" else torch.bfloat16
    precision = nullcontext() if options.precision == "32-true" else torch.autocast(device.type, mixed)

    def train() -> Tensor:
        with precision:
            loss = task.loss(module(on_device).float(), on_device.label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    def evaluate() -> Tensor:
        with precision, torch.no_grad():
            return module(on_device)

    try:
        first_loss = train()
        training, _ = _timed(train, device)
        evaluation, _ = _timed(evaluate, device)
    except torch.OutOfMemoryError as error:
        raise ConfigError(f"per_gpu_batchsize: {len(chosen)} samples do not fit into the GPU; give fewer") from error
    patient.cost = StepCost(loading, training, evaluation)
    fine = bool(first_loss.isfinite())
    speed = f"{training:.2f} s forward and backward, {loading:.2f} s to load; peak memory {_peak_memory(device)}"
    loss = f"loss {first_loss.item():.4f}" + ("" if fine else ", expected a finite number")
    yield Finding("ok" if fine else "FAIL", "training step", f"{len(chosen)} samples: {loss}; {speed}")


def _timed(work: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Seconds that `work` takes, the device's part included, and its result."""
    started = time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started, result


def _peak_memory(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{_size(torch.cuda.max_memory_allocated())} on the GPU"
    return f"{_size(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)} of this process"


def _run_bytes(classifier: MissingModalityClassifier) -> int:
    """best.ckpt; last.ckpt with the best model and the optimiser's moments, twice: the old one stays till the end."""
    kept = sum(tensor.nbytes for tensor in kept_state(classifier).values())
    trained = sum(parameter.nbytes for parameter in classifier.parameters() if parameter.requires_grad)
    last = 2 * kept + 2 * trained
    return kept + 2 * last


def check_time(patient: Patient) -> Iterator[Finding]:
    """How long a run of these options would take at the measured speed."""
    if patient.cost is None or "train" not in patient.datasets or "val" not in patient.datasets:
        yield Finding("warn", "length of the run", "not estimated: it needs a training step, and train and val")
        return
    options, cost = patient.options, patient.cost
    samples = {split: len(dataset) for split, dataset in patient.datasets.items()}
    seconds = run_seconds(options, cost, samples)
    batches = math.ceil(samples["train"] / (options.processes * options.per_gpu_batchsize))
    said = f"about {_duration(seconds)}: {options.max_epoch} epochs of {batches:,} batches"
    if options.max_steps is not None:
        said += f", {options.max_steps:,} steps at most"
    slow = cost.loading / max(1, options.num_workers) > cost.training
    if slow:
        said += "; loading is slower than training (image_cache=True keeps decoded images)"
    yield Finding("warn" if slow else "ok", "length of the run", said)


def run_seconds(options: Options, cost: StepCost, samples: Mapping[Split, int]) -> float:
    """An estimate: every batch takes what the slower one of loading and computing takes, or both without loaders.

    Args:
        samples: of each split that the run reads.
    """

    def per_batch(computing: float) -> float:
        if options.num_workers == 0:
            return cost.loading + computing
        return max(cost.loading / options.num_workers, computing)

    per_pass = options.processes * options.per_gpu_batchsize
    batches = {split: math.ceil(number / per_pass) for split, number in samples.items()}
    interval = options.val_check_interval
    validations = 1 / interval if isinstance(interval, float) else batches["train"] / interval
    epoch = batches["train"] * per_batch(cost.training) + validations * batches["val"] * per_batch(cost.evaluation)
    epochs = float(options.max_epoch)
    if options.max_steps is not None:
        epochs = min(epochs, options.max_steps * options.accumulation / batches["train"])
    return epochs * epoch + batches.get("test", 0) * per_batch(cost.evaluation)


def check_disks(patient: Patient) -> Iterator[Finding]:
    """Room and rights where a run writes."""
    options = patient.options
    if is_writable(options.log_dir):
        yield _room("log_dir", options.log_dir, patient.run_bytes, "checkpoints")
    else:
        yield Finding("FAIL", "log_dir", f"{options.log_dir}: expected a folder that can be written, or made")
    if not patient.datasets:
        return
    if is_writable(options.data_root):
        caches = [
            missing_bytes(one.path, one.n_rows, one.image_size) if options.image_cache else 0
            for one in patient.datasets.values()
        ]
        yield _room("data_root", options.data_root, sum(caches), "caches beside the arrow files")
    elif options.image_cache:
        yield Finding("FAIL", "data_root", f"{options.data_root}: image_cache needs a folder that can be written")
    else:
        yield Finding("warn", "data_root", f"{options.data_root}: not writable; each run makes the token ids anew")


def check_shared_memory(patient: Patient) -> Iterator[Finding]:
    """Loader processes hand batches over through shared memory, of which containers often have 64 MB."""
    options = patient.options
    if options.num_workers == 0:
        yield Finding("ok", "shared memory", "not needed (num_workers=0)")
    elif not SHARED_MEMORY.is_dir():
        yield Finding("warn", "shared memory", f"not looked at: there is no {SHARED_MEMORY}")
    else:
        size = patient.backbone.architecture.image_size if patient.backbone is not None else CLIP_IMAGE_SIZE
        batch = options.per_gpu_batchsize * 3 * size**2
        local = options.num_gpus or options.cpu_processes
        # The loaders of training and validation are there at the same time.
        needed = 2 * local * options.num_workers * BATCHES_AHEAD * batch
        yield _room("shared memory", SHARED_MEMORY, needed, f"batches of {options.num_workers} loader processes")


def _room(subject: str, folder: Path, needed: int, what: str) -> Finding:
    free = shutil.disk_usage(nearest_folder(folder)).free
    said = f"{folder}: {_size(free)} free, about {_size(needed)} needed for {what}"
    return Finding("FAIL" if free < needed else "warn" if free < 2 * needed else "ok", subject, said)


def check_memory(patient: Patient) -> Iterator[Finding]:
    """Main memory for the weights and the loaders of all processes of this machine."""
    options = patient.options
    weights = sum(tensor.nbytes for tensor in patient.backbone.state.values()) if patient.backbone is not None else 0
    local = options.num_gpus or options.cpu_processes
    needed = local * (2 * weights + 2 * options.num_workers * LOADER_BYTES)
    free = _free_memory()
    yield Finding(
        "ok" if free > needed else "warn", "memory", f"{_size(free)} free, about {_size(needed)} needed besides batches"
    )


def _free_memory() -> int:
    """Bytes that processes can still have: of the machine, or of the container if that has less."""
    entries = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text("ascii").splitlines())
    free = int(entries["MemAvailable"].split()[0]) * 1024
    with suppress(OSError, ValueError):  # no such file, or no limit: `max`
        limit, used = (int((CONTROL_GROUP / name).read_text("ascii")) for name in ("memory.max", "memory.current"))
        free = min(free, limit - used)
    return free


CHECKS: dict[str, Callable[[Patient], Iterator[Finding]]] = {
    "options": check_options,
    "device": check_device,
    "backbone": check_backbone,
    "tokenizer": check_tokenizer,
    "data": check_data,
    "training step": check_step,
    "length of the run": check_time,
    "disks": check_disks,
    "shared memory": check_shared_memory,
    "memory": check_memory,
}
"""In order; later ones use what earlier ones have found."""


def _size(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:.1f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.1f} MB"


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{seconds:.0f} s"
    days, hours = divmod(minutes // 60, 24)
    parts = [(days, "d"), (hours, "h"), (minutes % 60, "min")]
    return " ".join(f"{number} {unit}" for number, unit in parts if number)
