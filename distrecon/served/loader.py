"""What MLflow runs to load a packaged model: this file is copied into it."""

from pathlib import Path
from typing import Any, cast

import mlflow.models
import numpy as np
from mlflow.pyfunc import PythonModel, PythonModelContext

from distrecon.kinds import KINDS
from distrecon.record.kind import Served
from distrecon.record.store import FILES


class Loader(PythonModel):
    """Calls the model as its kind serves it; `unwrap_python_model().served.model` is the thing itself."""

    def load_context(self, context: PythonModelContext) -> None:
        serve = KINDS[context.model_config["kind"]].serve
        assert serve is not None  # or it would not have been packaged
        self.served = cast(Served, serve(Path(context.artifacts[FILES])))

    def predict(
        self, context: PythonModelContext, model_input: np.ndarray, params: dict[str, Any] | None = None
    ) -> np.ndarray:
        return self.served.call(np.asarray(model_input), **(params or {}))


mlflow.models.set_model(Loader())
