"""Models as tensors: states with their properties, which the tasks read, and the batches of a training."""

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


@dataclass(frozen=True)
class Batch:
    """A worker's share of one step's global batch: its rows [offset, offset + b) of `global_size`, all of one zoo.

    The global batch is the workers' shares in rank order. Where the last batch is small, a share may be empty (b = 0),
    so that every worker makes the same number of steps.
    """

    epoch: int
    step: int  # in the epoch, from 0
    zoo: int  # position of the zoo in the training
    row_b: Tensor  # rows' numbers in that zoo, int64
    theta_bP: Tensor  # float32
    global_size: int
    offset: int
    last: bool = False  # whether the epoch ends with this step
