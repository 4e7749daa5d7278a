"""The autoencoder's floor stands alone, its scoring included."""

import subprocess
import sys


def test_scoring_imports_neither_ray_nor_mlflow_nor_matplotlib():
    code = "import distrecon.autoencoder.scoring, sys; print({'ray', 'mlflow', 'matplotlib'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
