"""Named cases, correct before they are timed: `python -m benchmarks --list`."""
