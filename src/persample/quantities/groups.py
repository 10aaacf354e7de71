"""Groups of samples, whose gradients are added up before a quantity is taken."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from persample.errors import BatchError


def as_groups(groups: Tensor | Sequence[int], size: int) -> Tensor:
    """Return the number of each sample's group as a tensor on the CPU.

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
    return numbers.long()
