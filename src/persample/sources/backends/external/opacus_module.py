"""Opacus's own machinery: `GradSampleModule` around a stand-in of the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import Node

from persample.errors import DisagreementError
from persample.sources.backends.external.layer_gradients import trainable
from persample.sources.backends.external.layer_rules import own_callable
from persample.sources.backends.external.machinery import PeerMachinerySource, UnfitError
from persample.sources.backends.external.opacus_layers import (
    EMBEDDING_BAG,
    KNOWN,
    MADE_OF_LAYERS,
    TRANSPOSED,
    WITHOUT_MODE,
    GradSampleModule,
    cudnn_flag_restored,
    reason_against,
    refuse_chosen_output_size,
)
from persample.sources.backends.external.stand_in import Copies
from persample.sources.batch import Batch
from persample.sources.model.autograd_graph import nodes_from, variables_of
from persample.sources.model.module_calls import ModuleCall
from persample.sources.model.modules import modules_of
from persample.sources.model.refusals import describe
from persample.sources.selfcheck.tolerances import MOVED, Allowance
from persample.sources.selfcheck.verify import require_close

# Opacus keeps what it needs to know of a layer in these attributes of it.
_ATTRIBUTES_OF_LAYERS = ("activations", "ft_compute_sample_grad")


class OpacusModule(PeerMachinerySource):
    """Per-sample gradients by `opacus.GradSampleModule`.

    It serves the layers of PyTorch for which Opacus has a rule, those of `opacus.layers`, classes with a grad sampler
    of the user, and by `torch.func` any other module of one tensor, which it runs once more for each sample.

    Opacus passes over layers in eval mode. Those of PyTorch and of Opacus compute the same in both modes, so their
    copies in the stand-in are in training mode; the modes of all other modules are the user's.
    """

    title = "Opacus' GradSampleModule"
    attributes = ("grad_sample", "_current_grad_sample", "_forward_counter", "_norm_sample")

    @cached_property
    def layers(self) -> dict[str, nn.Module]:
        paths = modules_of(self.model)
        return {paths[module]: module for module in _hooked(self.model)}

    def reason_against(self, layer: nn.Module) -> str | None:
        for name in _ATTRIBUTES_OF_LAYERS:
            if hasattr(layer, name):
                return f"has an attribute {name!r}, which Opacus uses for itself: rename it."
        if type(layer) in KNOWN:
            return reason_against(layer)
        if isinstance(layer, nn.EmbeddingBag):
            return EMBEDDING_BAG
        if type(layer) not in GradSampleModule.GRAD_SAMPLERS:
            if isinstance(layer, nn.RNNBase):
                return (
                    f"cannot be run by torch.func, which Opacus would need: use opacus.layers.DP{type(layer).__name__}."
                )
            if any(True for _ in layer.buffers()):
                return "has parameters and buffers, and Opacus has no grad sampler for it."
            for module in layer.modules():
                if method := own_callable(module):
                    return f"has its own {method}, set on an instance, which Opacus cannot run again."
        if not layer.training and type(layer) not in WITHOUT_MODE:
            return "is in eval mode, where GradSampleModule skips it: call .train() on it."
        return None

    def known_reasons(self) -> Iterator[str]:
        for module, times in Counter(_hooked(self.model)).items():
            if times > 1:
                path = modules_of(self.model)[module]
                yield (
                    f"{describe(path, module)} belongs to {times} modules, and GradSampleModule counts it {times} "
                    "times."
                )
        yield from super().known_reasons()

    def reasons_against_calls(self, calls: list[ModuleCall], reached: set[Node]) -> Iterator[str]:
        used = {p for call in calls if call.edge.node in reached for p in call.module.parameters()}
        for call in calls:
            if call.edge.node not in reached and not used.isdisjoint(call.module.parameters()):
                yield (
                    f"{call.name} has a call that the losses do not depend on, and Opacus would mix up the inputs of "
                    "its calls."
                )
            layer, inputs = call.module, call.inputs[0]
            if isinstance(layer, nn.Conv2d) and not _in_order(inputs):
                yield (
                    f"{call.name} was called with an image that is not contiguous, which Opacus reads in the wrong "
                    "order."
                )
            if isinstance(layer, TRANSPOSED):
                refuse_chosen_output_size(call.name, layer, inputs, call.output)
            if type(layer) not in GradSampleModule.GRAD_SAMPLERS:
                inside = variables_of(nodes_from([call.edge.node], stop=call.input_nodes)) - set(layer.parameters())
                for name, p in self.parameters().items():
                    if p in inside:
                        yield f"{call.name} uses parameter {name!r} of another module, which Opacus does not notice."

    @contextmanager
    def prepared(self, copies: Copies) -> Iterator[Callable[..., Any]]:
        for layer in self.layers.values():
            copies[layer].training = True
            vars(copies[layer]).pop("max_batch_len", None)  # what a packed sequence left in a layer of Opacus
        yield GradSampleModule(copies[self.model], loss_reduction="sum")

    def compute_per_sample(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        with self.forward(batch) as (losses, _), cudnn_flag_restored():
            ordinary, rows = self.backward(losses, "grad_sample", (batch.size,))
        self._verify_run_again(losses, ordinary, rows)
        return losses.detach(), rows

    def _verify_run_again(self, losses: Tensor, ordinary: Mapping[str, Tensor], rows: Mapping[str, Tensor]) -> None:
        """Refuse modules without a grad sampler that compute something different under torch.func.

        Raises:
            UnfitError: the gradients of the samples do not add up to the ordinary one.
        """
        names = {p: name for name, p in self.parameters().items()}
        for path, layer in self.layers.items():
            if type(layer) in GradSampleModule.GRAD_SAMPLERS or type(layer) in KNOWN:
                continue
            own = [names[p] for p in layer.parameters() if p in names]
            sums = {name: rows[name].sum(0) for name in own}
            allowance = Allowance.of(losses, MOVED)
            try:
                require_close(self, "sum", sums, {name: ordinary[name] for name in own}, allowance, len(losses))
            except DisagreementError as disagreement:
                raise UnfitError(
                    f"{describe(path, layer)} has no grad sampler, so Opacus runs it for each sample by torch.func, "
                    "where it computes something different."
                ) from disagreement


def _hooked(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules that `GradSampleModule` puts hooks on, once for each hook."""
    if trainable(module) and type(module) not in MADE_OF_LAYERS:
        yield module
        if type(module) not in GradSampleModule.GRAD_SAMPLERS:
            return  # torch.func runs it with all that is inside
    for child in module.children():
        yield from _hooked(child)


def _in_order(images: Tensor) -> bool:
    """Whether the strides are those of a contiguous tensor, also where a dimension has length 1."""
    expected = 1
    for length, stride in zip(reversed(images.shape), reversed(images.stride()), strict=True):
        if stride != expected:
            return False
        expected *= length
    return True
