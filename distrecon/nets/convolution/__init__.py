"""Convolutional networks on the CPU, several times faster than `plain.py`: many models on shared inputs, in blocks.

- `blocks.py`: the forward and backward pass, cut into blocks that stay in cache; chooses one of two kernels:
- `modelwise.py`: one model at a time by oneDNN, best for large convolutions;
- `direct.py`: several models at once by compiled loops (`loops.py`), best for small ones.
- `kernel.py`: what a kernel is; `workspace.py`: memory taken once a pass.
"""

from distrecon.nets.convolution.blocks import forward

__all__ = ["forward"]
