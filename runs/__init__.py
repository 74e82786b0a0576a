"""Around a run: its command line, its options, its folder, and what many runs together give."""
