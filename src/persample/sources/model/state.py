"""What a model keeps from one forward pass to the next: kept as it is now, and put back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from persample.sources.model.held import LOOKED_INTO, TENSORS, Held, fill
from persample.sources.model.modules import modules_of

#: What every module holds besides attributes of its own: parameters, buffers, children, hooks, the training flag.
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_TABLES = _OF_EVERY_MODULE - {"training", "_buffers", "_non_persistent_buffers_set"}


class State:
    """What a model keeps from one forward pass to the next, as it is now.

    It is made of the buffers, of frozen parameters that the forward pass moves, and of the attributes of modules, as
    far as they are plain values and tensors, and lists, dicts, sets and tuples of them. What objects of other classes
    hold is not looked into.

    Args:
        model: the network.
        frozen: those of its parameters without gradient that its forward pass may move.
    """

    def __init__(self, model: nn.Module, frozen: Iterable[nn.Parameter] = ()) -> None:
        held = Held(model)
        self._modules, self.parameters, self._containers = held.modules, held.parameters, held.containers
        self._frozen = list(frozen)
        self._tensors = [_Values(t) for t in (*held.tensors, *self._frozen) if has_values(t)]

    def put_back(self) -> None:
        """Restore the model."""
        self._containers.put_back()
        for values in self._tensors:
            values.put_back()

    def carry_on(self) -> None:
        """Keep the state that a forward pass has changed, detached from the graph of the pass.

        A tensor in place of another one with the same values is not kept. All that is no part of the state is put
        back: hooks, the attributes of parameters, and what other packages keep in attributes of modules.
        """
        if self._containers.changed():
            outside = self._outside()
            for container, held in self._containers.before():
                fill(container, held if id(container) in outside else _carried_on(container, held))
        for values in self._tensors:
            values.leave_graph()

    def changed(self) -> bool:
        """Whether the state has changed."""
        if any(values.changed() for values in self._tensors):
            return True
        if not self._containers.changed():
            return False
        outside = self._outside()
        return any(id(c) not in outside and not _same_entries(c, held) for c, held in self._containers.before())

    def moved(self) -> list[nn.Parameter]:
        """Return the frozen parameters whose values have changed."""
        changed = {id(values.tensor) for values in self._tensors if values.changed()}
        return [p for p in self._frozen if id(p) in changed]

    def rows_kept(self, size: int) -> list[str]:
        """Return the changed buffers and attributes that held a tensor with a dimension of that size, by name.

        With the size of the batch, that are likely rows of the samples of an earlier pass.
        """
        names = []
        held_of = {id(container): held for container, held in self._containers.before()}
        values_of = {id(values.tensor): values for values in self._tensors}
        for module, path in modules_of(self._modules[0]).items():
            attributes = held_of.get(id(vars(module)), {})
            buffers = held_of.get(id(attributes.get("_buffers")), {})
            own = {name: value for name, value in attributes.items() if name not in _OF_EVERY_MODULE}
            for name, value in (own | buffers).items():
                tensors = [leaf for leaf in tree_leaves(value) if id(leaf) in values_of]
                changed = getattr(module, name, None) is not value or any(values_of[id(t)].changed() for t in tensors)
                if changed and any(size in values_of[id(t)].shape for t in tensors):
                    names.append(f"{path}.{name}" if path else name)
        return names

    def _outside(self) -> set[int]:
        """Return the ids of the containers that do not belong to the state."""
        found = set(map(id, map(vars, self.parameters)))
        held_of = {id(container): held for container, held in self._containers.before()}
        for module in self._modules:
            held = held_of[id(vars(module))]
            found.update(id(held[name]) for name in _TABLES & held.keys())
            if _is_of_a_package(module):
                found.update(map(id, (vars(module), *held.values())))
        return found


class _Values:
    """The values of a tensor, and where they were in memory."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self._plain = type(tensor) in (Tensor, nn.Parameter)
        # Without a version counter of its own to raise: graphs that saved the tensor see the same values again.
        self._memory = tensor.data
        self._values = tensor.detach().clone()
        self._requires_grad = tensor.requires_grad
        self._bytes = tensor.untyped_storage().nbytes() if self._plain else 0

    @property
    def shape(self) -> torch.Size:
        """The shape that it had."""
        return self._values.shape

    def put_back(self) -> None:
        """Restore the tensor's storage and values."""
        self.leave_graph()
        if self._elsewhere():
            self.tensor.data = self._memory  # whose storage may be larger now, after `resize_`
        # Compared by value, because writing through `.data` does not raise the version counter.
        if not torch.equal(self._memory, self._values):
            self._memory.copy_(self._values)

    def leave_graph(self) -> None:
        """Remove the autograd history that an in-place change gave the tensor."""
        if self.tensor.requires_grad and not self._requires_grad and not self.tensor._is_view():
            self.tensor.detach_()

    def changed(self) -> bool:
        """Whether the tensor's values have changed."""
        return self._elsewhere() or not torch.equal(self._memory, self._values)

    def _elsewhere(self) -> bool:
        tensor, memory = self.tensor, self._memory
        return self._plain and (
            tensor.data_ptr() != memory.data_ptr() or tensor.shape != memory.shape or tensor.stride() != memory.stride()
        )


def _is_of_a_package(module: nn.Module) -> bool:
    """Whether BackPACK or Opacus has hooks on it, which store data for the backward pass in its attributes."""
    hooks = module._forward_hooks.values()
    return any((getattr(hook, "__module__", None) or "").partition(".")[0] in ("backpack", "opacus") for hook in hooks)


def has_values(tensor: Tensor) -> bool:
    """Whether a tensor's entries can be read and compared."""
    return tensor.layout is torch.strided and not (tensor.is_meta or tensor.is_quantized)


def _carried_on(container: Any, held: Any) -> Any:
    """Return what to put into a container that held `held`, after a forward pass."""
    if not isinstance(container, dict):
        return [_without_graph(value) for value in container]
    now = {}
    for name, value in container.items():
        now[name] = held[name] if name in held and _equal(value, held[name]) else _without_graph(value)
    if held.keys() >= _OF_EVERY_MODULE:  # the attributes of a module
        now |= {name: held[name] for name in _OF_EVERY_MODULE}
    return now


def _equal(now: Any, before: Any) -> bool:
    if now is before:
        return True
    alike = type(now) is type(before) and TENSORS[type(now)] and has_values(now) and has_values(before)
    return alike and now.device == before.device and now.dtype == before.dtype and torch.equal(now, before)


def _without_graph(value: Any) -> Any:
    """Return `value` with its tensors detached: lists and dicts are changed, tensors and tuples replaced."""
    if not LOOKED_INTO[type(value)]:
        return value
    if isinstance(value, Tensor):
        return value.detach() if value.requires_grad else value
    entries = list(value.values() if isinstance(value, dict) else value)
    detached = [_without_graph(entry) for entry in entries]
    if all(map(is_, entries, detached)):
        return value
    if isinstance(value, tuple):
        return type(value)(*detached) if hasattr(value, "_fields") else type(value)(detached)
    fill(value, dict(zip(list(value), detached, strict=True)) if isinstance(value, dict) else detached)
    return value


def _same_entries(container: Any, held: Any) -> bool:
    """Whether a container holds, by identity, what it held; of a module, its attributes of its own."""
    if isinstance(container, dict):
        fixed = _OF_EVERY_MODULE if held.keys() >= _OF_EVERY_MODULE else frozenset()
        names = (container.keys() | held.keys()) - fixed
        return all(name in container and name in held and container[name] is held[name] for name in names)
    return len(container) == len(held) and all(map(is_, container, held))


@contextmanager
def state_restored(state: State) -> Iterator[None]:
    """Restore the state afterwards."""
    try:
        yield
    finally:
        state.put_back()
