"""Our step beside the original's, in one run: `python -m benchmarks --help`."""
