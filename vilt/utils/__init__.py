"""Converters of raw datasets to arrow files, and small helpers for files."""
