"""Many runs with one command: a grid of missing patterns and seeds, or a search for good option values."""
