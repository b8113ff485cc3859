"""This service beside what people use instead, a file a peer: `python -m benchmarks.peers`. See BENCHMARKS.md."""
