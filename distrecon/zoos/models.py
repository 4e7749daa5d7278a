"""Models and their properties as tensors: what the tasks of the autoencoder read from a zoo."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Models:
    """States of models, one row each: weights [B, P] float32 and properties [B].

    `row_B` is the state's position in the zoo (0 .. states - 1), the same however the zoo is read.
    """

    theta_BP: Tensor
    model_id: list[str]
    row_B: Tensor
    epoch_B: Tensor
    train_accuracy_B: Tensor
    test_accuracy_B: Tensor
    generalization_gap_B: Tensor
    train_loss_B: Tensor

    def __len__(self) -> int:
        return len(self.theta_BP)
