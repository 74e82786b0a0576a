"""`run.py export`: writes a trained model for sharing, with a model card."""

from pathlib import Path

from jinja2 import Environment, StrictUndefined

from clip.backbone import HUB_NAMES
from clip.modules.registry import PRETRAINING
from common.errors import CheckpointError, ConfigError
from common.text import figure, per_cent
from engine.checkpoint import Checkpoint, describe, read_checkpoint
from engine.exported import shared_name, write_exported
from runs.run_reader import Run, find_runs
from runs.targets import pattern_of

CARD = Path(__file__).with_name("model_card.md.j2")
OPTIONS = ("learning_rate", "batch_size", "max_epoch", "max_steps", "warmup_steps", "weight_decay")
"""Options shown in the model card."""


def export(load_path: Path | tuple[Path, ...] | None, out: Path | None = None) -> str:
    """Writes the model of a checkpoint to the folder `out`, by default `export` next to it; returns a message.

    Raises:
        CheckpointError: `load_path` is no checkpoint, or one of the published code, which contains its backbone.
        ConfigError: `out` exists, or no checkpoint is named.
    """
    if not isinstance(load_path, Path):
        raise ConfigError("load_path: expected a checkpoint to export, as in load_path=result/…/best.ckpt")
    checkpoint = read_checkpoint(load_path)
    if checkpoint.published:
        raise CheckpointError(f"{load_path}: expected a checkpoint of this program, found one of the published code")
    out = out or checkpoint.path.with_name("export")
    backbone = shared_name(str(checkpoint.backbone_name), out)
    model = (checkpoint.spec, backbone, str(checkpoint.backbone_sha256), checkpoint.class_names)
    trained = (checkpoint.contents, checkpoint.offset, checkpoint.training)
    described = describe(*model, checkpoint.tokenizer, *trained)
    runs = [run for run in find_runs(load_path.parent)[0] if run.folder == load_path.parent]
    write_exported(out, checkpoint.state, described, _card(checkpoint, runs[0] if runs else None))
    return f"written to {out}: {len(checkpoint.state)} tensors, a description and a model card"


def _card(checkpoint: Checkpoint, run: Run | None) -> str:
    spec, at, name = checkpoint.spec, checkpoint.training, str(checkpoint.backbone_name)
    test = None if run is None else run.test
    trained = f" ({test['trained_parameters']:,})" if test and test.get("trained_parameters") is not None else ""
    n_values = sum(tensor.numel() for tensor in checkpoint.state.values())
    if test is not None and test.get("checkpoint_sha256", checkpoint.sha256) != checkpoint.sha256:
        test = None  # the results are those of best.ckpt, and this is another checkpoint
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters |= {"figure": figure, "per_cent": lambda share: per_cent(round(share, 3))}
    return environment.from_string(CARD.read_text("utf-8")).render(
        title=checkpoint.path.stem if run is None else run.config["exp_name"],
        dataset=spec.dataset,
        task=spec.task,
        method=spec.method,
        pretrains=spec.method.prompt_type in PRETRAINING,
        head=spec.head,
        hub_name=HUB_NAMES.get(name),
        values=f"{n_values:,} values: the trained parameters{trained} and the method's fixed values",
        backbone=name if name in HUB_NAMES else Path(name).name,
        sha256=str(checkpoint.backbone_sha256),
        at=at,
        pattern=None if at is None else pattern_of(at),
        options={} if run is None else {name: value for name in OPTIONS if (value := run.config.get(name)) is not None},
        test=test,
        tested_at=None if run is None else run.tested_at,
        classes=", ".join(checkpoint.class_names or spec.dataset.class_names or ()) or spec.dataset.n_classes,
    )
