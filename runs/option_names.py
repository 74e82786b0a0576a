"""Names of options that belong together, for those who compare configurations."""

OF_OTHER_COMMANDS = frozenset(
    {"robustness_types", "robustness_ratios", "robustness_both_ratios", "robustness_seeds", "robustness_anew"}
    | {"bootstrap", "runs_sort", "runs", "out", "input", "output"}
    | {"sweep_name", "sweep_types", "sweep_ratios", "sweep_seeds", "sweep_over", "sweep_launcher", "sweep_slurm"}
    | {"search", "search_trials"}
)
"""Options that a training or a test does not read."""
