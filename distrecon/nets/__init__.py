"""Ground floor: architectures as index maps over theta[B, P], batched forward, symmetries, fitting. Torch only."""

from distrecon.nets.activations import ACTIVATIONS, activation
from distrecon.nets.architectures import ARCHITECTURES, Architecture, Layer, architecture
from distrecon.nets.evaluate import Scores, evaluate, outputs
from distrecon.nets.fit import Epoch, cross_entropy, fit
from distrecon.nets.initialise import INITIALISATIONS, initialise
from distrecon.nets.symmetries import rescale

__all__ = [
    "ACTIVATIONS",
    "ARCHITECTURES",
    "INITIALISATIONS",
    "Architecture",
    "Epoch",
    "Layer",
    "Scores",
    "activation",
    "architecture",
    "cross_entropy",
    "evaluate",
    "fit",
    "initialise",
    "outputs",
    "rescale",
]
