"""Data for learning with missing modalities: arrow datasets, missing tables, loaders. Independent of the model."""
