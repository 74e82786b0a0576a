"""In which options two runs may differ and still be one training, or one line of a table; by kind in config.py."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from config import COMMAND, DEFAULTS, MACHINE, OPTIONS, RUN

GONE = ("compile", "robustness_anew")
"""Options that the configurations of older runs have."""
_NO_RESULT = {
    *(name for name, option in OPTIONS.items() if option.kind in (MACHINE, RUN, COMMAND)),
    *("per_gpu_batchsize", "missing_ratio.test", "missing_type.test"),
    *GONE,
}
"""Names, places, the machine, the test pattern, other commands; entries of a dictionary as `option.key`."""
NOT_THE_TRAINING = frozenset(_NO_RESULT - {"test_only", "fast_dev_run"})
"""Options in which a run and the one that resumes it may differ. What of the machine and the data does matter is
checked when the checkpoint is read."""
NOT_THE_LINE = frozenset(_NO_RESULT | {"seed", "skip_bad_steps"})
"""Options in which runs of one line may differ."""
BY_CONTENT = {"vit": "backbone", "tokenizer": "tokenizer", "load_path": "load_path", "teacher": "teacher"}
"""Options that name files, with the entry of contents.json by which runs are compared in their place."""
BESIDE = ("head", "neighbours", "teacher")
"""Options of what a run has beside its method."""


def beside_method(options: Mapping[str, Any]) -> list[str]:
    """`option=value` of what a run has beside its method; every table names it, of a teacher its run's folder."""
    given = _not_default(options, *BESIDE)
    if "teacher" in given:
        given["teacher"] = of_run(given["teacher"])
    return [f"{name}={value}" for name, value in given.items()]


def of_run(checkpoint: object) -> str:
    """A path to a checkpoint as tables name it: by its run's folder, and by its own name if that says something."""
    path = Path(str(checkpoint))
    folders = path.parent.parts if path.name in ("best.ckpt", "last.ckpt", "export") else ()
    return "-".join((folders or path.parts)[-2:])


def other_input(options: Mapping[str, Any]) -> list[str]:
    """`option=value` of what gives a model more of a sample than published ones get; every table names it."""
    return [f"{name}={value}" for name, value in _not_default(options, "text_windows", "group_texts").items()]


def _not_default(options: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name in names if (value := options.get(name, DEFAULTS[name])) != DEFAULTS[name]}
