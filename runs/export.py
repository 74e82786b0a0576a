"""`run.py export`: a trained model to share, with a model card of what is known of it."""

from pathlib import Path
from typing import Any

from clip.backbone import HUB_NAMES
from common.errors import CheckpointError, ConfigError
from common.text import counted, figure, per_cent
from engine.checkpoint import Checkpoint, TrainedAt, describe, read_checkpoint
from engine.exported import write_exported
from runs.pattern import Pattern
from runs.run_reader import Run, find_runs

CARD = """---
library_name: rep
license: other
license_name: of-dataset-and-backbone
tags: [multimodal, missing-modality, {method}]
{base}---

# {title}

{dataset}, classified with {modalities}, of which any may be missing. Method: {method}; {sizes}.
What was trained is here ({values:,} values). The frozen backbone, {backbone} (sha256 {sha256}), is not:
it is looked for under that name, or where the option `vit` says.

## Use

```python
from rep import load_model  # in a checkout: from engine.predict import load_model

model = load_model("FOLDER")  # a copy of this folder
```

`python run.py with task_finetune_{task} load_path=FOLDER test_only=True …`, `robustness` and `predict` take it as a
checkpoint.

## Training

{training}

## Results

{results}

## Limits

Trained and measured on this dataset alone, with modalities removed at random: nothing is known of others, nor of
modalities that are missing for a reason. The licences of dataset and backbone apply to what was trained on them.

Classes: {classes}.
"""


def export(load_path: Path | tuple[Path, ...] | None, out: Path | None = None) -> str:
    """Writes the model of a checkpoint into the folder `out`, by default `export` beside it; says so.

    Raises:
        CheckpointError: it is none, or one of the published code, which holds its backbone.
        ConfigError: `out` is there already, or no checkpoint is named.
    """
    if not isinstance(load_path, Path):
        raise ConfigError("load_path: expected a checkpoint to export, as in load_path=result/…/best.ckpt")
    checkpoint = read_checkpoint(load_path)
    if checkpoint.published:
        raise CheckpointError(f"{load_path}: a checkpoint of the published code; expected one of this program")
    out = out or checkpoint.path.with_name("export")
    of_model = (checkpoint.spec, str(checkpoint.backbone_name), str(checkpoint.backbone_sha256), checkpoint.class_names)
    trained = (checkpoint.contents, checkpoint.offset, checkpoint.training)
    described = describe(*of_model, checkpoint.tokenizer, *trained)
    runs = [run for run in find_runs(load_path.parent)[0] if run.folder == load_path.parent]
    write_exported(out, checkpoint.state, described, _card(checkpoint, runs[0] if runs else None))
    return f"written to {out}: {len(checkpoint.state)} tensors, their description and a model card"


def _card(checkpoint: Checkpoint, run: Run | None) -> str:
    spec, names = checkpoint.spec, checkpoint.class_names or checkpoint.spec.dataset.class_names or ()
    method = spec.method
    return CARD.format(
        title=run.config["exp_name"] if run is not None else checkpoint.path.stem,
        dataset=spec.dataset.title,
        modalities=" and ".join(spec.dataset.modalities),
        method=method.prompt_type,
        base=f"base_model: {hub}\n" if (hub := HUB_NAMES.get(str(checkpoint.backbone_name))) is not None else "",
        sizes=f"memory_length {method.memory_length}, memory_depth {method.memory_depth}, head {spec.head}",
        values=sum(tensor.numel() for tensor in checkpoint.state.values()),
        backbone=Path(str(checkpoint.backbone_name)).name,
        sha256=str(checkpoint.backbone_sha256)[:16],
        task=spec.task,
        training=_training(run, checkpoint.training),
        results=_results(run),
        classes=", ".join(names) or spec.dataset.n_classes,
    )


def _training(run: Run | None, at: TrainedAt | None) -> str:
    facts = []
    if at is not None:
        facts.append(f"Missing modalities: {Pattern(at.missing_type, at.ratio, at.both_ratio)}. Seed: {at.seed}.")
        facts += [f"Code: commit {at.commit}."] if at.commit is not None else []
    if run is not None:
        shown = ("learning_rate", "batch_size", "max_epoch", "max_steps", "warmup_steps", "weight_decay")
        named = [f"{name} {run.config[name]}" for name in shown if run.config.get(name) is not None]
        facts.append(f"Options: {', '.join(named)}.")
    return " ".join(facts) or "No record of the training was beside the checkpoint."


def _results(run: Run | None) -> str:
    test: dict[str, Any] | None = run.test if run is not None else None
    if run is None or test is None or run.tested_at is None:
        return "Not tested."
    lines = [
        f"Test split, {counted(test['samples'], 'sample')}, missing: {run.tested_at}.",
        "",
        "| metric | value |",
        "|---|---|",
        *(f"| {name} | {figure(value)} |" for name, value in test["metrics"].items()),
    ]
    missing = ", ".join(
        f"{name} {per_cent(round(count / test['samples'], 3))}" for name, count in test["missing"].items()
    )
    return "\n".join([*lines, "", f"Of the samples: {missing}."])
