"""Everything around a run: command line, options, run folder, sweeps, comparison and report."""
