"""Weight autoencoder: model, losses, training step, storage, and the tasks predict, reconstruct, generate."""

from distrecon.autoencoder.config import PAPER, AutoencoderConfig
from distrecon.autoencoder.model import Autoencoder, ZooSample
from distrecon.autoencoder.store import load_autoencoder, save_autoencoder
from distrecon.autoencoder.tasks import TaskResults, run_tasks
from distrecon.autoencoder.training import Batch, Training

__all__ = [
    "PAPER",
    "Autoencoder",
    "AutoencoderConfig",
    "Batch",
    "TaskResults",
    "Training",
    "ZooSample",
    "load_autoencoder",
    "run_tasks",
    "save_autoencoder",
]
