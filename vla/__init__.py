"""Text, audio and vision: backbone, methods, and readers for the files of the published code."""
