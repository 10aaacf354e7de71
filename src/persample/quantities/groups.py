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
        of_each: for each sample the number of its group.
        numbers: of the groups.
        index: for each sample the place of its group among these.
    """

    of_each: Tensor
    numbers: Tensor
    index: Tensor

    def __len__(self) -> int:
        return len(self.numbers)


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
    numbers = numbers.long()
    return Groups(numbers, *numbers.unique(return_inverse=True))
