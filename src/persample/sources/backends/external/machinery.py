"""A package's own machinery, run on a stand-in of the model: shared by the adapters of BackPACK and Opacus.

Both packages put hooks on the modules of a model, and what they find on its parameters. Here they put the hooks on a
stand-in, and what they leave on the parameters is taken off again. One forward and one backward pass are run; whatever
is known to make their results wrong is refused before the backward pass.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from persample.errors import PersampleError, UnsupportedModelError
from persample.sources.backends.external.quiet import without_warnings
from persample.sources.backends.external.stand_in import Copies, stand_in
from persample.sources.batch import Batch
from persample.sources.model.autograd_graph import nodes_behind
from persample.sources.model.module_calls import (
    ModuleCall,
    recorded_calls,
    refuse_changed_inputs,
    refuse_lists,
    refuse_unseen_uses,
    require_batch_first,
)
from persample.sources.model.modules import modules_of
from persample.sources.model.random_state import random_state, set_random_state
from persample.sources.model.refusals import describe
from persample.sources.model.state import State, state_restored
from persample.sources.model.usage import Use
from persample.sources.recording.recorder import Recorder
from persample.sources.selfcheck.oracle import gradient, gradients_at
from persample.sources.source import PerSampleGradSource

Result = TypeVar("Result")

#: PyTorch and BackPACK say these of the hooks of the packages.
_OF_HOOKS = (
    "Full backward hook is firing when gradients are computed with respect to module outputs",
    "For backward hooks to be called, module output should be a Tensor or a tuple of Tensors",
    "Extension saving to",  # BackPACK has none for a module; it says so of every module with modules inside
)


#: What Opacus and BackPACK keep in attributes of modules.
_OF_PACKAGES = re.compile(r"activations|max_batch_len|ft_compute_sample_grad|input\d+|output\w*|training")


class UnfitError(UnsupportedModelError):
    """A package's machinery does not support a model; the message says why, but not yet what to do."""


class BusyError(UnfitError):
    """A package's machinery cannot be used at this moment, whatever the model."""


class PeerMachinerySource(PerSampleGradSource):
    """Per-sample gradients by another package's own machinery.

    A subclass says which modules the machinery gives results of and where it is wrong, and lets it prepare a stand-in
    of the model. Refusals are `UnfitError`s, to which `PeerSource` adds what to do.
    """

    #: How errors name the machinery.
    title: ClassVar[str]

    #: What it keeps on parameters.
    attributes: ClassVar[tuple[str, ...]]

    #: Whether the last forward pass gave modules of the stand-in other attributes, which the user's model lacks.
    moved_attributes = False

    # What a package implements.

    @cached_property
    @abstractmethod
    def layers(self) -> dict[str, nn.Module]:
        """The modules, by path, that the machinery returns results for: for their own parameters, or for all inside."""

    @abstractmethod
    def reason_against(self, layer: nn.Module) -> str | None:
        """Return why the machinery is wrong on one of `layers`, as a sentence without its subject, or None."""

    @abstractmethod
    def reasons_against_calls(self, calls: list[ModuleCall], reached: set[Node]) -> Iterator[str]:
        """Yield why the machinery is wrong on these calls of layers; the losses depend on the nodes `reached`."""

    @abstractmethod
    def prepared(self, copies: Copies) -> AbstractContextManager[Callable[..., Any]]:
        """Let the machinery prepare the stand-in of the model, and yield the module to call in place of the model."""

    # What a package can use.

    @contextmanager
    def forward(self, batch: Batch) -> Iterator[tuple[Tensor, list[ModuleCall]]]:
        """Run the forward pass on the prepared stand-in, and yield the losses and the calls of `layers`.

        Raises:
            UnsupportedModelError: the machinery would go wrong in the backward pass.
        """
        refuse_lists(batch)
        for p in self.model.parameters():
            for name in self.attributes:  # the user's, or those of a pass that failed
                vars(p).pop(name, None)
        with stand_in(self.model) as copies, without_warnings(*_OF_HOOKS), self.prepared(copies) as model:
            copied = {path: copies[layer] for path, layer in self.layers.items()}
            found = _watched(copied)
            before = [(copy, dict(vars(copy))) for copy in copies.values()]
            with recorded_calls(copied) as calls:
                losses = self.losses(batch, model)
            self.moved_attributes = any(_has_moved(copy, attributes) for copy, attributes in before)
            for reason in found:
                raise UnfitError(reason)
            refuse_unseen_uses(losses, calls, self.parameters())
            for call in calls:
                require_batch_first(call, batch)
                refuse_changed_inputs(call)
            for reason in self.reasons_against_calls(calls, nodes_behind(losses)):
                raise UnfitError(reason)
            for layer in copied.values():
                layer.register_forward_pre_hook(_refuse_repeated)
            yield losses, calls

    def backward(
        self, losses: Tensor, attribute: str, leading: tuple[int, ...] = ()
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Run the backward pass from the sum of the losses.

        Args:
            losses: those of `forward`.
            attribute: under which the machinery leaves its results on the parameters.
            leading: the dimensions of a result before those of the parameter.

        Returns:
            The ordinary gradients of the sum of the losses, and the results, by the names of the parameters; zeros
            where the losses do not depend on one.

        Raises:
            UnfitError: the machinery gave no result for a parameter, or one of another shape.
        """
        parameters = self.parameters()
        gradients = gradients_at(list(parameters.values()), losses, parameters)
        ordinary, results = {}, {}
        taken: set[int] = set()
        for (name, p), g in zip(parameters.items(), gradients, strict=True):
            result, shape = vars(p).pop(attribute, None), (*leading, *p.shape)
            if result is None and g is None:
                result = p.new_zeros(shape)
            if not isinstance(result, Tensor) or result.shape != shape:
                raise UnfitError(f"{self.title} gave no result of shape {shape} for parameter {name!r}.")
            storage = result.untyped_storage()
            if storage.nbytes() != result.nbytes or storage.data_ptr() in taken:  # a view, perhaps of another's δ
                result = result.clone(memory_format=torch.contiguous_format)
            taken.add(storage.data_ptr())
            ordinary[name] = p.new_zeros(p.shape) if g is None else g.to_dense()
            results[name] = result.to(p.dtype)
        return ordinary, results

    # What the rest of the package calls.

    def known_reasons(self) -> Iterator[str]:
        """Yield the known reasons why the machinery is wrong, before the model runs, as sentences."""
        for module, path in modules_of(self.model).items():
            if reason := _reason_against_copy(module):
                yield f"{describe(path, module)} {reason}"
        for path, layer in self.layers.items():
            if reason := self.reason_against(layer):
                yield f"{describe(path, layer)} {reason}"
        for name, p in self.parameters().items():
            dtype = torch.get_autocast_dtype(p.device.type) if torch.is_autocast_enabled(p.device.type) else p.dtype
            if dtype in (torch.bfloat16, torch.float16):
                yield (
                    f"{self.title} sums the gradients of parameter {name!r} in {dtype}, which is less precise than "
                    "float32."
                )

    def refuse_unsupported(self) -> None:
        for reason in self.known_reasons():
            raise UnfitError(reason)

    def state_changed(self, state: State) -> bool:
        return self.moved_attributes or super().state_changed(state)

    def find_uses(self, batch: Batch | None) -> Iterator[Use]:
        if batch is None:
            for path, layer in self.layers.items():
                yield from self._uses(layer, path)
            return
        with self.forward(batch) as (losses, calls):
            reached = nodes_behind(losses)
            for call in calls:
                if call.edge.node in reached:
                    yield from self._uses(call.module, call.path)
        fewer = batch.take(slice(0, batch.size - 1))
        if fewer.size:
            # There another dimension that is as long as the batch by chance does not pass for the samples.
            with state_restored(self.state()), self.forward(fewer):
                pass
        with state_restored(self.state()):
            self.compute_moments(batch.take(slice(0, 2)))

    def attempt(self, batch: Batch, compute: Callable[[PerSampleGradSource], Result]) -> Result:
        """Return the result of `compute` for this source and `batch`; restore the model's state if it fails.

        Raises:
            UnsupportedModelError: the machinery does not fit the model.
        """
        start, state = random_state(self.model), self.state()

        def go_back() -> None:
            state.put_back()
            set_random_state(start)

        try:
            return compute(self)
        except UnsupportedModelError:
            go_back()
            raise
        except (PersampleError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            go_back()
            gradient(self.losses(batch).sum(), self)  # an error that the plain model raises too is the user's own
            go_back()
            raise UnfitError(self._reason_of(error)) from error

    # Inner workings.

    def _reason_of(self, error: Exception) -> str:
        what = f"{type(error).__name__}: {str(error).split(chr(10))[0]}".rstrip(".")
        if "modified inplace" in what:
            return (
                "The model changes the input or output of a module in place, which PyTorch forbids on modules with "
                f"{self.title}'s hooks: pass inplace=False there."
            )
        return f"{self.title} cannot run this model ({what})."

    def _uses(self, layer: nn.Module, path: str) -> Iterator[Use]:
        names = {id(p): name for name, p in self.parameters().items()}
        for p in layer.parameters():
            if id(p) in names:
                yield Use(names[id(p)], "rule", type(layer).__name__, path)


def _has_moved(module: nn.Module, before: Mapping[str, Any]) -> bool:
    """Whether an attribute of a module of the stand-in was replaced, other than those that packages set."""
    return any(
        value is not before.get(name, before) and not _OF_PACKAGES.fullmatch(name)
        for name, value in vars(module).items()
    )


def _reason_against_copy(module: nn.Module) -> str | None:
    """Return why a copy cannot replace `module`, as a sentence without its subject."""
    if isinstance(module, torch.jit.ScriptModule):
        return "is compiled by TorchScript, so no hooks can be put on a copy of it."
    tables = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    if any(not isinstance(getattr(hook, "__self__", None), Recorder) for table in tables for hook in table.values()):
        return "has hooks, which may change its inputs or outputs, and would run on a copy of it."
    return None


def _watched(layers: Mapping[str, nn.Module]) -> list[str]:
    """Refuse calls of `layers` that the machinery would get wrong; the returned list collects the reasons.

    The list is for models that catch what is raised in their forward pass.
    """
    found: list[str] = []

    def refuse(reason: str) -> None:
        found.append(reason)
        raise UnfitError(reason)

    def watch(layer: nn.Module, name: str) -> None:
        def on_call(layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if not torch.is_grad_enabled():
                return
            if kwargs or len(args) != 1 or not isinstance(args[0], Tensor):
                refuse(f"{name} was called with something other than one positional tensor.")
            if not isinstance(output, Tensor):
                refuse(f"{name} returned {type(output).__name__}, not a tensor.")

        def on_gradient(layer: nn.Module, deltas: Any) -> None:
            found.append(f"The model runs a backward pass in its forward pass, through {name}.")

        layer.register_forward_hook(on_call, with_kwargs=True, prepend=True)
        layer.register_full_backward_pre_hook(on_gradient)

    for path, layer in layers.items():
        watch(layer, describe(path, layer))
    return found


def _refuse_repeated(module: nn.Module, args: Any) -> None:
    """A hook on layers while the backward pass runs."""
    raise UnfitError(
        f"A layer ({type(module).__name__}) runs again in the backward pass (activation checkpointing), which the "
        "machinery would count as another use."
    )
