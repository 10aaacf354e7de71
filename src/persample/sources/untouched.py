"""Leaving no trace: contexts that put a model, its buffers and the random numbers back as they were."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from operator import is_, methodcaller
from typing import Any

import torch
from torch import Tensor, nn

from persample.errors import UnsupportedModelError
from persample.sources.modules import modules_of

RandomState = dict[torch.device, Tensor]


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Put everything but the buffers' values back afterwards; after an exception the buffers too.

    Gradients, hooks, attributes of parameters and modules and the training flags are as before, whatever happens
    inside. Inside, every `p.grad` is None. Buffers keep what one ordinary forward pass changed, unless an exception
    passes through.
    """
    modules = list(modules_of(model))
    parameters = [(p, p.grad) for p in _distinct(module._parameters for module in modules)]
    # A module's own tables are its parameters, buffers, children, all kinds of hooks, and what else it holds in dicts.
    attributes = [vars(module) for module in modules]
    tables = [value for entries in attributes for value in entries.values() if isinstance(value, dict)]
    snapshot = _Snapshot([*attributes, *tables, *(vars(p) for p, _ in parameters)])
    buffers = _buffer_snapshot(modules)
    registries = [module._buffers for module in modules]
    failed = True
    try:
        for parameter, gradient in parameters:
            if gradient is not None:
                parameter.grad = None
        yield
        failed = False
    finally:
        # Buffers that the forward pass bound anew (`self.mean = …`) are among what it may change.
        snapshot.put_back(but=() if failed else registries)
        for parameter, gradient in parameters:
            if parameter.grad is not gradient:
                parameter.grad = gradient
        if failed:
            buffers()


class _Snapshot:
    """The keys and values of dicts, side by side in one list each, so that one look tells that nothing has changed.

    Most tables of a model are empty, those of its hooks, and most calls change nothing: both cost next to nothing.
    """

    def __init__(self, tables: Collection[dict[Any, Any]]) -> None:
        self.empty = [table for table in tables if not table]
        self.full = [table for table in tables if table]
        self.lengths, self.keys, self.values = self._now()

    def _now(self) -> tuple[list[int], list[Any], list[Any]]:
        full = self.full
        return list(map(len, full)), list(chain.from_iterable(full)), list(chain.from_iterable(map(_values, full)))

    def changed(self) -> bool:
        """Whether a dict holds something else, or in another order; by identity, as tensors give no answer to `==`."""
        if any(self.empty):
            return True
        lengths, keys, values = self._now()
        return not (lengths == self.lengths and all(map(is_, keys, self.keys)) and all(map(is_, values, self.values)))

    def put_back(self, but: Iterable[dict[Any, Any]] = ()) -> None:
        """Make each dict hold what it held, without replacing the dict itself; leave those of `but` as they are."""
        if not self.changed():
            return
        left_out = {id(table) for table in but}
        for table in self.empty:
            if id(table) not in left_out:
                table.clear()
        start = 0
        for table, length in zip(self.full, self.lengths, strict=True):
            part = slice(start, start + length)
            start += length
            if id(table) not in left_out:
                table.clear()
                table.update(zip(self.keys[part], self.values[part], strict=True))


_values = methodcaller("values")


def buffer_snapshot(model: nn.Module) -> Callable[[], None]:
    """Return a function that puts the buffers of `model` back to what they are now."""
    return _buffer_snapshot(list(modules_of(model)))


def _buffer_snapshot(modules: list[nn.Module]) -> Callable[[], None]:
    registries = _Snapshot([module._buffers for module in modules])
    values = [(buffer, buffer.detach().clone()) for buffer in _distinct(registries.full)]

    def put_back() -> None:
        registries.put_back()
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
