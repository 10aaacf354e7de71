"""A BatchNorm with constant statistics, also in training mode, so that samples do not mix."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm


class FrozenBatchNorm(_BatchNorm):
    """A BatchNorm of any dimension that always uses its running statistics, as in eval mode.

    It stays in eval mode when `.train()` is called on it or on the model that holds it, so the statistics no longer
    change. Scale and shift are trained as before, and the `state_dict` is that of the BatchNorm which it replaces.
    The arguments are those of `nn.BatchNorm2d`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.train()

    def train(self, mode: bool = True) -> FrozenBatchNorm:
        """Stay in eval mode, whatever `mode` is."""
        del mode
        super().train(False)
        return self

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected input of at least 2 dimensions, got {input.dim()}")
