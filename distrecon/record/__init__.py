"""A run folder and what is in it: the journals of its sweeps, the trials' artifacts, and their copy in MLflow;
and what a kind of trial is, which says how its trials are run, recorded and shown.

`record.tracking` is the only file that imports MLflow.
"""
