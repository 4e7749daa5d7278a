"""The coders by the name that `model.kind` gives them. Adding one: see `coder.py`."""

from distrecon.autoencoder.activation_pca import ActivationPCA
from distrecon.autoencoder.coder import Coder
from distrecon.autoencoder.linear_coders import FisherPCA, FisherResidual, KroneckerPCA, KroneckerResidual
from distrecon.autoencoder.transformer import TransformerCoder

CODERS: dict[str, type[Coder]] = {
    "transformer": TransformerCoder,
    "fisher_residual": FisherResidual,
    "fisher_pca": FisherPCA,
    "kronecker_residual": KroneckerResidual,
    "kronecker_pca": KroneckerPCA,
    "activation_pca": ActivationPCA,
}
