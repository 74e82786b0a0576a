"""Data of missing-modality learning: arrow datasets, missing tables, loaders. Knows nothing of the model."""
