"""In which options two runs may differ and still be one training, or one line of a table; by kind in config.py."""

from config import COMMAND, MACHINE, OPTIONS, RUN

_NO_RESULT = {
    *(name for name, option in OPTIONS.items() if option.kind in (MACHINE, RUN, COMMAND)),
    *("per_gpu_batchsize", "missing_ratio.test", "missing_type.test"),
    *("compile", "robustness_anew"),  # of older runs
}
"""Names, places, the machine, the test pattern, other commands; entries of a dictionary as `option.key`."""
NOT_THE_TRAINING = frozenset(_NO_RESULT - {"test_only", "fast_dev_run"})
"""Options in which a run and the one that resumes it may differ. What of the machine and the data does matter is
checked when the checkpoint is read."""
NOT_THE_LINE = frozenset(_NO_RESULT | {"seed", "skip_bad_steps"})
"""Options in which runs of one line may differ."""
