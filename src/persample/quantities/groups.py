"""Groups of samples, whose gradients are added up before a quantity is taken."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from persample.errors import BatchError


@dataclass(frozen=True)
class Groups:
    """The groups of a batch, in ascending order of their numbers.

    Attributes:
        numbers: of the groups.
        index: for each sample the place of its group among these.
    """

    numbers: Tensor
    index: Tensor

    def __len__(self) -> int:
        return len(self.numbers)

    def are_in_order(self) -> bool:
        """Whether the samples of each group follow each other, the groups ascending."""
        return bool((self.index.diff() >= 0).all())

    def take(self, order: Tensor) -> Groups:
        """Return the groups of the samples in another order."""
        return Groups(self.numbers, self.index[order])


def as_groups(groups: Tensor | Sequence[int], size: int) -> Groups:
    """Return the groups of a batch of `size` samples, as tensors on the CPU.

    Raises:
        BatchError: these are not `size` whole numbers.
    """
    try:
        numbers = torch.as_tensor(groups, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise BatchError(f"groups must be a whole number for each of the {size} samples: {error}.") from error
    if numbers.shape != (size,) or numbers.is_floating_point() or numbers.is_complex() or numbers.dtype == torch.bool:
        raise BatchError(
            f"groups must be a whole number for each of the {size} samples, such as that of its user; got "
            f"{numbers.dtype} of shape {tuple(numbers.shape)}."
        )
    return Groups(*numbers.long().unique(return_inverse=True))
