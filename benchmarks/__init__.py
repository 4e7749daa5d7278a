"""Benchmarks: `python -m benchmarks` runs the suite; the other files are commands of their own."""
