"""This service beside what people use instead: `python -m benchmarks.peers`. BENCHMARKS.md has the figures."""
