"""Trials' models as MLflow models: `package` writes them, `loader` is what MLflow runs to load one."""
