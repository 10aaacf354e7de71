"""BackPACK's own machinery: `extend` on a stand-in of the model, and `with backpack(...)`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

from backpack import backpack, disable, extend, memory_cleanup
from backpack.context import CTX
from backpack.extensions import BatchGrad, SumGradSquared
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.utils import _pytree as pytree

from persample.frozen_batch_norm import FrozenBatchNorm
from persample.moments import Moments
from persample.sources.backends.external.backpack_layers import reason_against
from persample.sources.backends.external.layer_gradients import trainable
from persample.sources.backends.external.machinery import BusyError, PeerMachinerySource, UnfitError
from persample.sources.backends.external.stand_in import Copies
from persample.sources.batch import Batch
from persample.sources.model.module_calls import ModuleCall
from persample.sources.model.modules import modules_of
from persample.sources.model.refusals import describe

# Neither holds anything of a call, and to make one takes as long as to use it on a small layer.
_BATCH_GRAD = BatchGrad()
_SUM_GRAD_SQUARED = SumGradSquared()

# BackPACK keeps what passes through a module in these attributes of it, and in input1, input2, …
_ATTRIBUTES_OF_MODULES = ("input0", "output")


class BackpackExtend(PeerMachinerySource):
    """Per-sample gradients by BackPACK's `extend` and `with backpack(...)`.

    BackPACK's context is global. So it is held for the time of the backward pass only, and refused while it is active
    elsewhere; another thread that enters it in that time is disturbed, as BackPACK's threads always disturb each other.
    """

    title = "BackPACK's extend"
    attributes = ("grad_batch", "sum_grad_squared")

    @cached_property
    def layers(self) -> dict[str, nn.Module]:
        return {path: module for module, path in modules_of(self.model).items() if trainable(module)}

    def reason_against(self, layer: nn.Module) -> str | None:
        if isinstance(layer, FrozenBatchNorm):
            return "is of a class that BackPACK does not know."
        return reason_against(layer)

    def known_reasons(self) -> Iterator[str]:
        for module, path in modules_of(self.model).items():
            for name in _ATTRIBUTES_OF_MODULES:
                if hasattr(module, name):
                    yield (
                        f"{describe(path, module)} has an attribute {name!r}, which BackPACK would overwrite: rename "
                        "it."
                    )
        yield from super().known_reasons()

    def reasons_against_calls(self, calls: list[ModuleCall], reached: set[Node]) -> Iterator[str]:
        times = Counter(p for call in calls for p in trainable(call.module))
        for call in calls:
            if any(times[p] > 1 for p in trainable(call.module)):
                yield (
                    f"A parameter of {call.name} is used by more than one call of a layer, and BackPACK keeps only the "
                    "last."
                )

    @contextmanager
    def forward(self, batch: Batch) -> Iterator[tuple[Tensor, list[ModuleCall]]]:
        inputs = pytree.tree_leaves((batch.args, dict(batch.kwargs)))
        if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in inputs):
            raise UnfitError(
                "An input of the model requires a gradient. BackPACK's hook on the model turns it into a non-leaf, "
                "and makes all other inputs require gradients."
            )
        with super().forward(batch) as found:
            yield found

    @contextmanager
    def prepared(self, copies: Copies) -> Iterator[Callable[..., Any]]:
        _refuse_if_busy()
        try:
            yield extend(copies[self.model])
        finally:
            # BackPACK keeps the handle of every hook in one list for the whole process.
            hooks = {id(table) for copy in copies.values() for table in (copy._forward_hooks, copy._backward_hooks)}
            CTX.hook_handles[:] = [h for h in CTX.hook_handles if id(h.hooks_dict_ref()) not in hooks]
            # What its hooks keep until the backward pass, whose graph holds the hooks, is a circle.
            for copy in copies.values():
                memory_cleanup(copy)

    def compute_per_sample(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        with self.forward(batch) as (losses, _), _backpack(_BATCH_GRAD):
            _, rows = self.backward(losses, "grad_batch", (batch.size,))
        return losses.detach(), rows

    def compute_moments(self, batch: Batch) -> Moments:
        with self.forward(batch) as (losses, calls):
            if any(isinstance(call.module, nn.Linear) and call.output.dim() > 2 for call in calls):
                # On a sequence SumGradSquared needs B·L·I·O numbers where opt_einsum is missing.
                with _backpack(_BATCH_GRAD):
                    total, rows = self.backward(losses, "grad_batch", (batch.size,))
                squares = {name: g.square().sum(0) for name, g in rows.items()}
            else:
                with _backpack(_SUM_GRAD_SQUARED):
                    total, squares = self.backward(losses, "sum_grad_squared")
        return Moments(
            losses=losses.detach(),
            mean={name: g / batch.size for name, g in total.items()},
            second_moment={name: s / batch.size for name, s in squares.items()},
        )


@contextmanager
def _backpack(extension: BatchGrad | SumGradSquared) -> Iterator[None]:
    """`with backpack(extension)`, refused while another such block is active."""
    _refuse_if_busy()
    with backpack(extension):
        yield


def _refuse_if_busy() -> None:
    if CTX.get_active_exts() or not disable.should_store_io():
        raise BusyError(
            "BackPACK's settings are global, and a block that changes them is active: call this outside `with "
            "backpack(...)` and `with backpack.disable()`."
        )
