"""A default loss: a weighted sum of a model's outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from persample.errors import LossError
from persample.sources.recording.forward_pass import tensors_of


def weighted_sum_of_outputs() -> Callable[[Any, Tensor], Tensor]:
    """Return a loss that depends on every output of a sample, with different weights.

    Its targets are there for their number alone. Outputs whose dim 0 is not the sample in the first batch, such as the
    last states of recurrent layers, are left out of all batches.
    """
    chosen: list[int] = []

    def loss_fn(outputs: Any, targets: Tensor) -> Tensor:
        leaves = tensors_of(outputs)
        chosen.extend(
            place
            for place, leaf in enumerate(() if chosen else leaves)
            if leaf.is_floating_point() and leaf.shape[:1] == targets.shape
        )
        if not chosen:
            raise LossError(
                "No output of the model is a tensor whose dim 0 is the sample, so no default loss can be computed "
                "from them: pass loss_fn (and targets if it needs them)."
            )
        total: Tensor = leaves[chosen[0]].new_zeros(len(targets))
        for place in chosen:
            flat = leaves[place].reshape(len(targets), -1)
            total = total + flat @ torch.linspace(1, 2, flat.shape[1], dtype=flat.dtype, device=flat.device)
        return total

    return loss_fn
