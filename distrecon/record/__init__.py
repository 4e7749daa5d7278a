"""A run folder and what is in it: the journals of its sweeps, the trials' artifacts, and their copy in MLflow.

`record.tracking` is the only file that imports MLflow.
"""
