"""The datasets as arrow files, and which of their modalities are missing."""
