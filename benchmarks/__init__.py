"""Benchmarks, a file for each subject. `python -m benchmarks` runs them all."""
