"""Ground floor: architectures as index maps over theta[B, P], batched forward, symmetries, fitting. Torch, numba."""

from distrecon.nets.activations import ACTIVATIONS, Activation, activation
from distrecon.nets.architectures import Architecture, ChainArchitecture, ModuleArchitecture
from distrecon.nets.evaluation import Scores, evaluate, inputs_for, outputs
from distrecon.nets.fit import OPTIMIZERS, Epoch, cross_entropy, fit
from distrecon.nets.initialise import INITIALISATIONS, initialise
from distrecon.nets.known import ARCHITECTURES, architecture
from distrecon.nets.layers import Layer
from distrecon.nets.matching import SYMMETRIES, align
from distrecon.nets.symmetries import permute, random_permutation, rescale

__all__ = [
    "ACTIVATIONS",
    "ARCHITECTURES",
    "INITIALISATIONS",
    "OPTIMIZERS",
    "SYMMETRIES",
    "Activation",
    "Architecture",
    "ChainArchitecture",
    "Epoch",
    "Layer",
    "ModuleArchitecture",
    "Scores",
    "activation",
    "align",
    "architecture",
    "cross_entropy",
    "evaluate",
    "fit",
    "initialise",
    "inputs_for",
    "outputs",
    "permute",
    "random_permutation",
    "rescale",
]
