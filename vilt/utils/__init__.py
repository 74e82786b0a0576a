"""Converters from raw datasets to arrow files, and their helpers."""
