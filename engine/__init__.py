"""Training, evaluation, checkpoints and resuming, robustness and prediction of models on data."""
