"""Leaving no trace: contexts that put a model, its buffers and the random numbers back as they were."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from persample.errors import UnsupportedModelError

RandomState = dict[torch.device, Tensor]


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Put everything but the buffers' values back afterwards; after an exception the buffers too.

    Gradients, hooks, attributes of parameters and modules and the training flags are as before, whatever happens
    inside. Inside, every `p.grad` is None. Buffers keep what one ordinary forward pass changed, unless an exception
    passes through.
    """
    modules = list(model.modules())
    attributes = [(vars(module), dict(vars(module))) for module in modules]
    tables = [table for _, saved in attributes for table in _tables(saved)]
    parameters = [(p, p.grad, dict(vars(p))) for p in _distinct(module._parameters for module in modules)]
    buffers = _buffer_snapshot(modules)
    failed = True
    try:
        for parameter, _, _ in parameters:
            parameter.grad = None
        yield
        failed = False
    finally:
        for live, saved in attributes:
            _restore(live, saved)
        for name, live, entries in tables:
            # Buffers that the forward pass bound anew (`self.mean = …`) are among what it may change.
            if name != "_buffers" or failed:
                _restore(live, entries)
        for parameter, gradient, saved in parameters:
            parameter.grad = gradient
            _restore(vars(parameter), saved)
        if failed:
            buffers()


def buffer_snapshot(model: nn.Module) -> Callable[[], None]:
    """Return a function that puts the buffers of `model` back to what they are now."""
    return _buffer_snapshot(list(model.modules()))


def _buffer_snapshot(modules: list[nn.Module]) -> Callable[[], None]:
    registries = [(module._buffers, dict(module._buffers)) for module in modules]
    values = [(buffer, buffer.detach().clone()) for buffer in _distinct(entries for _, entries in registries)]

    def put_back() -> None:
        for registry, entries in registries:
            _restore(registry, entries)
        _set_buffer_values(values)

    return put_back


def _distinct(tables: Iterable[Mapping[str, Tensor | None]]) -> list[Any]:
    """Return the tensors in `tables`, each once."""
    return list({id(t): t for table in tables for t in table.values() if t is not None}.values())


@contextmanager
def buffers_restored(model: nn.Module) -> Iterator[None]:
    """Put the buffers of `model` back afterwards."""
    put_back = buffer_snapshot(model)
    try:
        yield
    finally:
        put_back()


def random_state(model: nn.Module) -> RandomState:
    """Return the state of the default random number generators that a forward pass of `model` may draw from."""
    devices = {p.device for p in model.parameters()} | {torch.device("cpu")}
    return {d: _generator_module(d).get_rng_state(*_index(d)) for d in devices if d.type in ("cpu", "cuda")}


def set_random_state(state: RandomState) -> None:
    """Set the default random number generators to what `random_state` returned."""
    for device, value in state.items():
        _generator_module(device).set_rng_state(value, *_index(device))


def same_random_state(first: RandomState, second: RandomState) -> bool:
    """Whether nothing was drawn between the two states."""
    return all(torch.equal(value, second[device]) for device, value in first.items())


@contextmanager
def random_state_restored(model: nn.Module, inside: RandomState) -> Iterator[None]:
    """Draw from the state `inside` within the context, and go on afterwards as if nothing had been drawn."""
    outside = random_state(model)
    set_random_state(inside)
    try:
        yield
    finally:
        set_random_state(outside)


def _generator_module(device: torch.device) -> Any:
    return torch.cuda if device.type == "cuda" else torch


def _index(device: torch.device) -> tuple[torch.device, ...]:
    return (device,) if device.type == "cuda" else ()


def _tables(attributes: dict[str, Any]) -> list[tuple[str, dict[Any, Any], dict[Any, Any]]]:
    """A module's own tables, parameters, buffers, children and all kinds of hooks: name, the table, and a copy."""
    return [(name, table, dict(table)) for name, table in attributes.items() if isinstance(table, dict)]


def _restore(live: dict[Any, Any], saved: dict[Any, Any]) -> None:
    """Make `live` hold exactly the entries of `saved`, in that order, without replacing the dict itself."""
    if not live and not saved:
        return
    # Compared by identity: tensors have no single answer to `==`.
    if list(live) != list(saved) or not all(map(is_, live.values(), saved.values())):
        live.clear()
        live.update(saved)


def _set_buffer_values(values: list[tuple[Tensor, Tensor]]) -> None:
    with torch.no_grad():
        for buffer, value in values:
            # Compared by value, because writing through `.data` does not raise the version counter.
            if not torch.equal(buffer, value):
                buffer.copy_(value)


@contextmanager
def parameters_guarded(model: nn.Module) -> Iterator[None]:
    """Put parameters back that the forward pass itself rewrites, and refuse the model.

    Raises:
        UnsupportedModelError: a parameter has other values, or another `requires_grad`, than before.
    """
    saved = [(name, p, p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()]

    def put_back() -> list[str]:
        """Return the names of those that had changed."""
        changed = []
        for name, p, value, requires_grad in saved:
            if p.requires_grad != requires_grad or not _same(p.detach(), value):
                changed.append(name)
                p.requires_grad_(requires_grad)
                with torch.no_grad():
                    p.copy_(value)
        return changed

    try:
        yield
    except BaseException as error:
        if (changed := put_back()) and isinstance(error, Exception):
            raise _rewriting(changed[0]) from error
        raise
    if changed := put_back():
        raise _rewriting(changed[0])


def _rewriting(name: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"The model's forward pass rewrites its own parameter {name!r}: the gradients would belong to other weights "
        "than the model's. Take that out of the forward pass (max_norm, clamping, an update of its own)."
    )


def _same(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and torch.equal(first.nan_to_num(), second.nan_to_num())
