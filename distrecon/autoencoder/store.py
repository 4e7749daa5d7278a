"""An autoencoder on disk: `autoencoder.safetensors` (learned and fitted tensors) and `autoencoder.json` (the rest)."""

import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from distrecon import config as configuration
from distrecon.autoencoder.config import AutoencoderConfig
from distrecon.autoencoder.model import Autoencoder
from distrecon.errors import UserError, reading
from distrecon.nets import Architecture

FORMAT = "distrecon.autoencoder"
VERSION = 1
JSON, TENSORS = "autoencoder.json", "autoencoder.safetensors"


def save_autoencoder(folder: str | Path, autoencoder: Autoencoder) -> None:
    """Writes both files into `folder`, made where it is missing; the tensors first, so that the JSON means complete."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: t.detach().cpu().contiguous() for name, t in autoencoder.state_dict().items()}, folder / TENSORS)
    description = {
        "format": FORMAT,
        "version": VERSION,
        "config": configuration.flatten(autoencoder.config),
        "architectures": [arch.to_dict() for arch in autoencoder.architectures],
    }
    (folder / JSON).write_text(json.dumps(description, indent=1) + "\n")


def load_autoencoder(folder: str | Path) -> Autoencoder:
    """The autoencoder saved in `folder`, ready to use on the CPU.

    Raises UserError when the folder holds none, a damaged one, or one of a newer format.
    """
    folder = Path(folder)
    for name in (JSON, TENSORS):
        if not (folder / name).is_file():
            raise UserError(f"{folder} holds no autoencoder: {name} is missing")
    try:
        description = json.loads((folder / JSON).read_text())
        tensors = load_file(folder / TENSORS)
    except (json.JSONDecodeError, UnicodeDecodeError, SafetensorError) as error:
        raise UserError(f"the autoencoder in {folder} cannot be read: {error}") from None
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise UserError(f"{folder / JSON} does not describe an autoencoder")
    if not isinstance(description.get("version"), int) or description["version"] > VERSION:
        raise UserError(
            f"the autoencoder in {folder} has format version {description.get('version')}, newer than {VERSION}: "
            "update distrecon"
        )
    with reading(folder / JSON):
        config = configuration.replace(AutoencoderConfig(), description["config"], str(folder / JSON))
        architectures = [Architecture.from_dict(data) for data in description["architectures"]]
        fitted = [_statistics(tensors, i) for i in range(len(architectures))]
        autoencoder = Autoencoder(config, architectures, fitted)
    try:
        autoencoder.load_state_dict(tensors)
    except RuntimeError as error:
        first = str(error).splitlines()[-1].strip()
        raise UserError(f"{folder / TENSORS} does not belong to {JSON}: {first}") from None
    return autoencoder.eval()


def _statistics(tensors: dict[str, Tensor], zoo: int) -> dict[str, Tensor]:
    prefix = f"statistics.{zoo}."
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
