"""A mini-batch as every source sees it: positional and keyword arguments of the model, targets, and the size B."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from persample.errors import BatchError, DisagreementError, LossError, PersampleError, UnsupportedModelError, UsageError
from persample.sources.model.calling import fits
from persample.sources.model.detached_inputs import changeable, entering
from persample.sources.splits.detection import is_list, with_splits
from persample.sources.splits.objects import holds_tensors, is_array
from persample.sources.splits.parts import Entries, Fields
from persample.sources.splits.tree import (
    Columns,
    Followed,
    Index,
    Split,
    columns_of,
    followed_in,
    joined,
    kind_of,
    kind_of_tensor,
    map_tensors,
    plain,
    samples_at,
    take_samples,
    tensors_in,
)

Tree = tuple[tuple[Any, ...], dict[str, Any], Any]
"""Positional arguments, keyword arguments and targets."""


@dataclass(frozen=True)
class Batch:
    """B samples: arguments of the model, and targets.

    Dim 0 of every tensor is the sample, but for what `persample.shared` and the like say of it.

    Attributes:
        args: positional arguments, as the model gets them.
        kwargs: keyword arguments.
        targets: what the loss gets.
        size: B, the number of samples.
        split_tree: the same three with a `Split` in place of each part that is split otherwise; None if there is none.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    targets: Any
    size: int
    split_tree: Tree | None = field(default=None, repr=False)

    @staticmethod
    def of(tree: Tree, size: int) -> Batch:
        """Return the batch of these arguments and targets, with a `Split` for each part not split along dim 0."""
        split = not _is_simple(tree) and any(isinstance(leaf, Split) for leaf in pytree.tree_leaves(tree))
        args, kwargs, targets = plain(tree) if split else tree
        return Batch(args, kwargs, targets, size, tree if split else None)

    def tree(self) -> Tree:
        """Return arguments and targets, with a `Split` for each part not split along dim 0."""
        return self.split_tree or (self.args, dict(self.kwargs), self.targets)

    def inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments, each `Split` among them, as `with_inputs` takes them."""
        args, kwargs, _ = self.tree()
        return args, kwargs

    def inputs_only(self) -> Batch:
        """Return the batch without targets."""
        return Batch.of((*self.inputs(), None), self.size)

    def followed(self) -> Iterator[Followed]:
        """Yield the tensors of the batch, and the owners of their entries."""
        return followed_in(self.tree())

    def columns(self) -> Columns:
        """Return the batch as tensors with one entry for each sample, see `Split.columns`.

        Raises:
            UnsupportedModelError: the samples of a part have different shapes.
        """
        args, kwargs, targets = self.tree()
        return joined([columns_of("inputs", args), columns_of("inputs", kwargs), columns_of("targets", targets)])

    def for_a_call(self) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
        """Return arguments and targets for one call of model and loss, which may change them in place."""
        tree = map_tensors(changeable(), self.tree())
        args, kwargs, targets = tree if self.split_tree is None else plain(tree)
        return args, kwargs, targets

    def kind(self) -> tuple[Any, ...]:
        """Return what batches of the same kind have in common: structure, dtypes and numbers of dimensions."""
        leaves: Sequence[Any] = (*self.args, *self.kwargs.values(), self.targets)
        if self.split_tree is None and all(isinstance(leaf, Tensor) for leaf in leaves):
            return len(self.args), *self.kwargs, *[kind_of_tensor(leaf) for leaf in leaves]
        return len(self.args), *self.kwargs, kind_of(self.tree())

    def with_targets(self, targets: Any) -> Batch:
        """Return the batch with its inputs detached, and other targets."""
        args, kwargs = map_tensors(entering(), self.inputs())
        return Batch.of((args, kwargs, targets), self.size)

    def with_inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Batch:
        """Return the batch with other arguments, structured like those of `inputs`."""
        return Batch.of((args, kwargs, self.tree()[2]), self.size)

    def double(self) -> Batch:
        """Return the batch in float64; integers keep their dtype."""
        return Batch.of(in_float64(self.tree()), self.size)

    def take(self, index: Index) -> Batch:
        """Return the batch of the samples at `index`, in that order."""
        size = len(range(self.size)[index]) if isinstance(index, slice) else len(index)
        return Batch.of(take_samples(self.tree(), index, samples_at(index)), size)

    def not_first(self) -> list[Tensor]:
        """Return the tensors whose dim 0 is not the sample."""
        return (
            []
            if self.split_tree is None
            else [t for t, dim, owners in self.followed() if dim != 0 or owners is not None]
        )

    @contextmanager
    def doubted(self) -> Iterator[None]:
        """Let errors inside the context say which part of the batch may not be samples."""
        try:
            yield
        except PersampleError as error:
            self.add_doubts(error)
            raise

    def add_doubts(self, error: BaseException) -> None:
        """Let an error say which part of the batch may not be samples."""
        if isinstance(error, UnsupportedModelError | DisagreementError | UsageError | LossError):
            args, kwargs, targets = self.tree()
            trees = {"inputs": _inputs(args, kwargs), "targets": targets}
            leaves = [leaf for name, tree in trees.items() for leaf in _named_leaves(name, tree, is_list)]
            alone = len(leaves) <= 2  # besides the targets
            doubts = [
                _doubt(name, leaf, self.size) for name, leaf in leaves if not (alone and isinstance(leaf, Tensor))
            ]
            error.args = (" ".join([str(error), *filter(None, doubts)]),)


def in_float64(tree: Any) -> Any:
    """Return `tree` with every floating-point tensor in float64; integers keep their dtype."""
    return map_tensors(entering(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor), tree)


def as_batch(inputs: Any, targets: Any, model: nn.Module | None = None) -> Batch:
    """Return `inputs` and `targets` as a `Batch`.

    Args:
        inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments of the model. A tuple or dict
            that does not fit the parameters of its `forward`, but does so as one argument, is that. Dim 0 of every
            tensor is the sample, unless `persample.shared` or `persample.batched` say something else. A list of B
            entries has one for each sample, unless dim 0 of all tensors in it is the sample. What is none of that
            (None, flags, numbers) is passed to the model as it is.
        targets: tensors, also in tuples, lists and dicts, as for `inputs`; a list of B numbers becomes a tensor; or
            None.
        model: the model, whose `forward` tells what it takes.

    Raises:
        BatchError: there is no tensor, no sample, the lengths differ, or something cannot be split.
    """
    if torch.is_inference_mode_enabled():
        raise BatchError(
            "torch.inference_mode() is active, where gradients do not exist: leave it, or use torch.no_grad() instead."
        )
    args, kwargs = arguments(inputs, model)
    batch = split_batch(args, kwargs, targets, whole=len(args) == 1 and args[0] is inputs)
    # Whatever the batch was computed from is no part of the model.
    return Batch.of(map_tensors(entering(), batch.tree()), batch.size)


def arguments(inputs: Any, model: nn.Module | None = None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return `inputs` as positional and keyword arguments of the model, see `as_batch`.

    Raises:
        BatchError: `inputs` is of another type.
    """
    if isinstance(inputs, Tensor | Split) or is_array(inputs):
        return (inputs,), {}
    if not isinstance(inputs, tuple | Mapping):
        raise BatchError(
            f"inputs is of type {type(inputs).__name__}: pass a tensor, a tuple of positional arguments or a dict of "
            "keyword arguments of the model. (inputs,) passes it whole, as the only argument; tuple(inputs) passes "
            "the entries of a list as arguments."
        )
    args, kwargs = ((), dict(inputs)) if isinstance(inputs, Mapping) else (tuple(inputs), {})
    whole = model is not None and len(inputs) > 0 and not fits(model, args, kwargs) and fits(model, (inputs,), {})
    return ((inputs,), {}) if whole else (args, kwargs)


def split_batch(
    args: tuple[Any, ...], kwargs: dict[str, Any], targets: Any, *, whole: bool = False, for_gradients: bool = True
) -> Batch:
    """Return the batch of these arguments and targets, see `as_batch`; the tensors are those that were given.

    Args:
        args: positional arguments.
        kwargs: keyword arguments.
        targets: the targets.
        whole: whether the only argument is what the user calls inputs.
        for_gradients: whether gradients are asked for; else there may be no samples, and tensors of inference mode.

    Raises:
        BatchError: there is no tensor, no sample, the lengths differ, or something cannot be split.
    """
    if not _is_simple((args, kwargs, targets)):
        (args, kwargs), targets = with_splits((args, kwargs), targets)
    sizes = _sizes("inputs", args[0] if whole else _inputs(args, kwargs), for_gradients)
    if not sizes:
        raise BatchError("inputs holds no tensor: pass at least one tensor whose dim 0 is the sample.")
    sizes |= _sizes("targets", targets, for_gradients)
    (first, size), *others = sizes.items()
    for name, other in others:
        if other != size:
            raise BatchError(f"{first} has {size} samples, but {name} has {other}: {_ADVICE}")
    if size == 0 and for_gradients:
        raise BatchError("The batch has no samples: skip empty batches, no gradient can be averaged over them.")
    return Batch.of((args, kwargs, targets), size)


_ADVICE = (
    "dim 0 of every tensor is the sample, so all must have the same length there. If all samples share a tensor (a "
    "mask, an adjacency, positions), pass persample.shared(tensor); if its samples are in another dim, "
    "persample.batched(tensor, dim=1). If it holds samples of different lengths one after the other (offsets, "
    "concatenated targets, many graphs as one), pass padded tensors, or a list with one tensor for each sample, and "
    "flatten them in the model or in the loss."
)


def _is_simple(tree: Tree) -> bool:
    """Whether all arguments and targets are tensors, or None."""
    args, kwargs, targets = tree
    return all(leaf is None or isinstance(leaf, Tensor) for leaf in (*args, *kwargs.values(), targets))


def _inputs(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Return the arguments, indexed as the user passed them."""
    if kwargs and args:
        return {"args": args, **kwargs}
    return kwargs or args


def _named_leaves(
    name: str, tree: Any, is_leaf: Callable[[Any], bool] = lambda node: False
) -> Iterator[tuple[str, Any]]:
    """Yield the leaves of `tree`, including those inside objects, and their names."""
    if isinstance(tree, Tensor):
        yield name, tree
        return
    leaves = pytree.tree_flatten_with_path(tree, is_leaf)[0]
    for path, leaf in leaves:
        where = name + pytree.keystr(path) if len(leaves) > 1 else name
        if isinstance(leaf, Fields):
            yield from _named_leaves(where, leaf.fields, is_leaf)
        else:
            yield where, leaf


def _sizes(name: str, tree: Any, for_gradients: bool) -> dict[str, int]:
    """Number of samples of each part of `tree`, by its path."""
    sizes = {}
    for where, leaf in _named_leaves(name, tree):
        if isinstance(leaf, Tensor):
            _refuse_unsplittable(where, leaf, for_gradients)
            sizes[where] = len(leaf)
        elif isinstance(leaf, Split):
            sizes |= dict(leaf.sizes(where))
        elif holds_tensors(leaf) or is_array(leaf):
            raise BatchError(
                f"{where} is of type {type(leaf).__name__}, which holds tensors or arrays, but cannot be split into "
                "samples: pass its tensors (padded, if samples have different lengths) and build it in the model; or "
                "pass a list with one for each sample; or persample.shared(...), if all samples share it."
            )
    return sizes


def _refuse_unsplittable(where: str, tensor: Tensor, for_gradients: bool) -> None:
    if tensor.dim() == 0:
        raise BatchError(
            f"{where} is a tensor without dimensions, but dim 0 must be the sample: pass a Python number, expand it "
            "to one entry per sample, or pass persample.shared(tensor)."
        )
    if for_gradients and tensor.is_inference():
        raise BatchError(
            f"{where} was created under torch.inference_mode(), so autograd cannot save it: pass {where}.clone()."
        )
    if tensor.layout != torch.strided or tensor.is_nested:
        raise BatchError(
            f"{where} is a sparse or nested tensor ({tensor.layout}), which cannot be split into samples: pass a "
            "dense one (.to_dense(), .to_padded_tensor(0.0)) and convert it in the model; or "
            "persample.shared(tensor), if all samples share it."
        )


def _doubt(name: str, leaf: Any, size: int) -> str:
    """Return a hint that `leaf` may have been misread, as a sentence; empty if there is no doubt."""
    if isinstance(leaf, Tensor) and leaf.shape[:2] == (size, size) and size > 1:
        return (
            f"(Dim 0 of {name}, of shape {tuple(leaf.shape)}, was taken for the samples: pass persample.shared(tensor) "
            "if all samples share it, or persample.batched(tensor, dim=1) if they are in another dim.)"
        )
    if isinstance(leaf, list) and len(leaf) > 1 and tensors_in(leaf):
        return (
            f"(The list {name} was taken for {len(leaf)} tensors whose dim 0 is the sample: pass "
            "persample.one_per_sample(list) if each entry is a sample.)"
        )
    if isinstance(leaf, Entries) and leaf.guessed and not tensors_in(leaf):
        return (
            f"(Each entry of the list {name} was taken for a sample: pass a tuple, or persample.shared(list), if it "
            "is something else.)"
        )
    return ""
