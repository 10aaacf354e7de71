"""Peers as their own documentation uses them, and `vmap` in chunks: further backends, known to the benchmarks only."""

from __future__ import annotations

import copy
import warnings
from typing import Any

from torch import Tensor, nn

import persample
from persample import Moments, PerSampleGradSource
from persample.errors import UnsupportedModelError
from persample.sources import Batch
from persample.sources.vmap import VmapSource


class ChunkedVmap(VmapSource):
    """`vmap` over 16 samples at a time."""

    def __init__(self, model: nn.Module, loss_fn: Any, *, chunk_size: int = 16, check: Any = "first") -> None:
        super().__init__(model, loss_fn, chunk_size=chunk_size, check=check)


class BackpackItself(PerSampleGradSource):
    """BackPACK by `extend` and `with backpack(SumGradSquared())`, on a copy of the model that shares its parameters."""

    def __init__(self, model: nn.Module, loss_fn: Any, *, check: Any = "first") -> None:
        from backpack import extend

        super().__init__(model, loss_fn, check=check)
        shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        self.extended = extend(copy.deepcopy(model, shared))

    def compute_moments(self, batch: Batch) -> Moments:
        """Return the moments by `SumGradSquared` and the ordinary gradient."""
        from backpack import backpack
        from backpack.extensions import SumGradSquared

        losses = self._backward(batch, backpack(SumGradSquared()))
        parameters = self.parameters().items()
        for name, p in parameters:
            if not hasattr(p, "sum_grad_squared"):
                raise UnsupportedModelError(f"BackPACK has no result for parameter {name!r}.")
        return Moments(
            losses,
            {name: p.grad / batch.size for name, p in parameters},
            {name: p.sum_grad_squared / batch.size for name, p in parameters},
        )

    def compute_per_sample(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the rows of `BatchGrad`."""
        from backpack import backpack
        from backpack.extensions import BatchGrad

        losses = self._backward(batch, backpack(BatchGrad()))
        return losses, {name: p.grad_batch for name, p in self.parameters().items()}

    def _backward(self, batch: Batch, context: Any) -> Tensor:
        with warnings.catch_warnings(), context:
            warnings.simplefilter("ignore")
            losses = self.losses(batch, self.extended)
            losses.sum().backward()  # type: ignore[no-untyped-call]
        return losses.detach()


class OpacusItself(PerSampleGradSource):
    """Opacus by `GradSampleModule`, on a copy of the model that shares its parameters."""

    def __init__(self, model: nn.Module, loss_fn: Any, *, check: Any = "first") -> None:
        from opacus import GradSampleModule

        super().__init__(model, loss_fn, check=check)
        shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        self.wrapped = GradSampleModule(copy.deepcopy(model, shared), loss_reduction="sum")

    def compute_per_sample(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return `p.grad_sample`."""
        for p in self.model.parameters():
            p.grad_sample = None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            losses = self.losses(batch, self.wrapped)
            losses.sum().backward()  # type: ignore[no-untyped-call]
        gradients = {name: p.grad_sample for name, p in self.parameters().items()}
        return losses.detach(), gradients


def register() -> None:
    """Make these backends known to `persample.make_source`."""
    here = __name__
    persample.register_backend("vmap in chunks", f"{here}:ChunkedVmap")
    persample.register_backend("BackPACK itself", f"{here}:BackpackItself")
    persample.register_backend("Opacus itself", f"{here}:OpacusItself")
