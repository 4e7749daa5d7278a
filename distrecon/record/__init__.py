"""A run folder and what is in it: the journals of its sweeps, the trials' artifacts, and their copy in MLflow;
and what a kind of trial is, which says how its trials are run, recorded and shown.

`record.store` and `record.tracking` are the only files that import MLflow.
"""

import os

# before MLflow is imported, which reads them
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
# a store that is down must not hold the sweep's progress up for minutes: what fails is sent again later anyway
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
