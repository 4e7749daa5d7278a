"""Trials' models in MLflow's own format, so that `mlflow.pyfunc.load_model` loads them and a registry serves them.

A package holds the model's own files (safetensors and JSON) and the code that reads them; nothing in it is pickled.
"""

import logging
import shutil
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import mlflow.pyfunc
import numpy as np
from mlflow.models import ModelSignature
from mlflow.types import ParamSchema, ParamSpec, Schema, TensorSpec
from mlflow.types.schema import DataType

from distrecon.record.kind import Kind, Served
from distrecon.record.store import FILES

_TYPES = {str: DataType.string, int: DataType.long, float: DataType.double}


def package(kind: Kind, files: Sequence[Path], target: Path) -> bool:
    """Writes a trial's model, which consists of these files, as an MLflow model at `target`; False when it is none."""
    if kind.serve is None or not files:
        return False
    own = target.parent / FILES
    own.mkdir()
    for file in files:
        shutil.copyfile(file, own / file.name)
    served = kind.serve(own)
    if served is None:
        return False
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    mlflow.pyfunc.save_model(
        target,
        python_model=str(Path(__file__).with_name("loader.py")),
        artifacts={FILES: str(own)},
        model_config={"kind": kind.name},
        signature=signature(served),
        input_example=served.example,
        pip_requirements=[f"distrecon=={version('distrecon')}"],
    )
    return True


def signature(served: Served) -> ModelSignature:
    """What the model takes and gives: arrays with any number of rows, and options with their defaults."""
    options = [ParamSpec(name, _TYPES[type(value)], value) for name, value in served.options.items()]
    given, answered = served.example, served.call(served.example, **served.options)
    return ModelSignature(_schema(given), _schema(answered), ParamSchema(options))


def _schema(array: np.ndarray) -> Schema:
    return Schema([TensorSpec(array.dtype, (-1,) * array.ndim)])
