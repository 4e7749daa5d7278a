"""Benchmarks of the speed of distrecon's kernels against straightforward implementations; see `__main__.py`."""
