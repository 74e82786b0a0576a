"""The table of datasets, and the reading of their arrow files."""
