"""Training, evaluation, checkpoints and resuming, robustness and prediction."""
