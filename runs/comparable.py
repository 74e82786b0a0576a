"""Options in which runs may differ and still count as one training run, or as one line of a table."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from config import COMMAND, DEFAULTS, MACHINE, OPTIONS, RUN

REMOVED = ("compile", "robustness_anew")
"""Removed options, which may still be in the config.json of older runs."""
_NO_RESULT = {
    *(name for name, option in OPTIONS.items() if option.kind in (MACHINE, RUN, COMMAND)),
    *("per_gpu_batchsize", "missing_ratio.test", "missing_type.test"),
    *REMOVED,
}
"""Options without effect on a training run's result (names, paths, machine, test pattern, other commands); entries of
dictionaries as `option.key`."""
NOT_THE_TRAINING = frozenset(_NO_RESULT - {"test_only", "fast_dev_run"})
"""Options in which a run and the one that resumes it may differ. Differences of machine and data that do matter are
found when the checkpoint is read."""
NOT_THE_LINE = frozenset(_NO_RESULT | {"seed", "skip_bad_steps"})
"""Options in which the runs of one line may differ."""
BY_CONTENT = {"vit": "backbone", "tokenizer": "tokenizer", "load_path": "load_path", "teacher": "teacher"}
"""Options that name files. Runs are compared by the file contents instead: by this entry of contents.json."""
ADDITIONS = ("head", "neighbours", "teacher", "label_ratio")
"""Options that change any method and that every table names."""


def additions(options: Mapping[str, Any]) -> list[str]:
    """What a run adds to its method, as `option=value`, for every table; a teacher is named by its run folder."""
    given = _not_default(options, *ADDITIONS)
    if "teacher" in given:
        given["teacher"] = checkpoint_label(given["teacher"])
    return [f"{name}={value}" for name, value in given.items()]


def checkpoint_label(checkpoint: object) -> str:
    """Short name of a checkpoint for tables: its run folder, with the file name unless that is a standard one."""
    path = Path(str(checkpoint))
    folders = path.parent.parts if path.name in ("best.ckpt", "last.ckpt", "export") else ()
    return "-".join((folders or path.parts)[-2:])


def other_input(options: Mapping[str, Any]) -> list[str]:
    """Options that give a model more of a sample than published ones get, as `option=value`, for every table."""
    return [f"{name}={value}" for name, value in _not_default(options, "text_windows", "group_texts").items()]


def _not_default(options: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name in names if (value := options.get(name, DEFAULTS[name])) != DEFAULTS[name]}
