"""Text, audio and vision: backbone, methods, and the files that published code wrote."""
