"""An architecture of your own: one function that returns layers. Forward, tokens and symmetries follow from it."""

import torch

from distrecon.nets import Architecture, align, initialise, permute, random_permutation
from distrecon.nets.known import cnn


def wide_and_flat(image_size: int = 8, activation: str = "gelu") -> Architecture:
    convolutions = [{"name": "conv", "out": 12, "kernel": 3, "padding": 1, "pool": 2}]
    return cnn("wide_and_flat", convolutions, [("classify", 10)], 1, image_size, activation)


arch = wide_and_flat()
theta_BP = initialise(arch, ["kaiming_normal"] * 5, seeds=range(5))  # five models
images = torch.randn(32, *arch.input_shape)
logits_BQC = arch.forward(theta_BP, images)
print(f"{arch.num_parameters} parameters, {arch.num_tokens} tokens; logits {tuple(logits_BQC.shape)}")

permuted_BP = permute(arch, theta_BP, random_permutation(arch, torch.Generator().manual_seed(0), count=5))
print(f"reordered units change the outputs by {(arch.forward(permuted_BP, images) - logits_BQC).abs().max():.1e}")
print(f"aligned back to the first model: {(align(arch, permuted_BP, theta_BP[0])[0] - theta_BP[0]).abs().max():.1e}")
