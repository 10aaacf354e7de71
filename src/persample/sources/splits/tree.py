"""Trees (tuples, lists, dicts) of tensors, of parts that are not split along dim 0, and of anything else."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils import _pytree as pytree

from persample.sources.model.detached_inputs import entering

Index = slice | list[int]
TensorFunction = Callable[[Tensor], Tensor]


class Followed(NamedTuple):
    """Which sample each entry of a tensor of the batch belongs to.

    Attributes:
        tensor: the tensor.
        dim: the dimension along which the samples are; None if the whole tensor belongs to one sample, or to all.
        owners: the samples to which the entries along `dim` belong (or the whole tensor), where these are not the
            samples in order; None with `dim` None if all samples share the tensor.
    """

    tensor: Tensor
    dim: int | None = 0
    owners: Tensor | None = None


SHARED = (None, None)
"""The dimension and the owners of what all samples share."""


Take = Callable[[Tensor, int], Tensor]
"""Returns what belongs to some samples, of a tensor and the dimension along which its samples are."""


class Column(NamedTuple):
    """A tensor for `torch.func.vmap` to map over: one entry for each sample.

    Attributes:
        tensor: a tensor of the batch, to which the entry is like.
        values: the entries; the tensor itself if all samples share it.
        dim: the dimension of `values` that holds the samples; None if all samples share it.
    """

    tensor: Tensor
    values: Tensor
    dim: int | None


Columns = tuple[list[Column], Callable[[list[Tensor]], Any]]
"""The columns of a part of the batch, and what makes a sample of their entries."""


class Split(ABC):
    """A part of a batch that defines how it is split into samples."""

    @property
    @abstractmethod
    def value(self) -> Any:
        """The part as passed to the model or the loss."""

    @abstractmethod
    def sizes(self, where: str) -> Iterator[tuple[str, int]]:
        """Yield the number of samples, with the name of the part that defines it."""

    @abstractmethod
    def take(self, index: Index, take: Take) -> Split:
        """Return the part for the samples at `index`, taken by `take`."""

    @abstractmethod
    def map(self, function: TensorFunction) -> Split:
        """Return the part with a function applied to every tensor."""

    @abstractmethod
    def followed(self) -> Iterator[Followed]:
        """Yield its tensors, and their owners."""

    @abstractmethod
    def kind(self) -> Hashable:
        """Return a key that parts of the same kind share."""

    @abstractmethod
    def columns(self, where: str) -> Columns:
        """Return tensors with one entry for each sample.

        Raises:
            UnsupportedModelError: the samples have different shapes.
        """


# Trees whose leaves are tensors, parts of a batch that are split in another way, and anything else.


def tensors_in(tree: Any) -> list[Tensor]:
    """Return all tensors in `tree`, including those inside a `Split`."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(note, tree)
    return found


def map_tensors(function: TensorFunction, tree: Any) -> Any:
    """Return `tree` with a function applied to every tensor."""
    if isinstance(tree, Tensor):
        return function(tree)
    if type(tree) is tuple:
        return tuple([map_tensors(function, value) for value in tree])
    if type(tree) is dict:
        return {key: map_tensors(function, value) for key, value in tree.items()}

    def of_leaf(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return function(leaf)
        return leaf.map(function) if isinstance(leaf, Split) else leaf

    return pytree.tree_map(of_leaf, tree)


def samples_at(index: Index) -> Take:
    """Return a function that takes the samples at `index`; a tensor passed twice stays one object."""
    along: dict[int, TensorFunction] = {}

    def take(tensor: Tensor, dim: int) -> Tensor:
        if dim not in along:
            along[dim] = entering(lambda tensor: tensor[(slice(None),) * dim + (index,)])
        return along[dim](tensor)

    return take


def take_samples(tree: Any, index: Index, take: Take) -> Any:
    """Return `tree` with only the samples at `index`; other leaves are unchanged."""

    def of_leaf(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return take(leaf, 0)
        return leaf.take(index, take) if isinstance(leaf, Split) else leaf

    return pytree.tree_map(of_leaf, tree)


def plain(tree: Any) -> Any:
    """Return `tree` as passed to the model or the loss."""
    return pytree.tree_map(lambda leaf: leaf.value if isinstance(leaf, Split) else leaf, tree)


def leaves_of(where: str, tree: Any) -> list[tuple[str, Any]]:
    """Return the leaves of `tree`, each with its name, which begins with `where`."""
    return [(where + pytree.keystr(path), leaf) for path, leaf in pytree.tree_flatten_with_path(tree)[0]]


def sizes_of(where: str, leaf: Any) -> Iterator[tuple[str, int]]:
    """Yield the number of samples of a leaf, with its name; nothing if it has none."""
    if isinstance(leaf, Tensor):
        yield where, len(leaf)
    elif isinstance(leaf, Split):
        yield from leaf.sizes(where)


def followed_in(tree: Any) -> Iterator[Followed]:
    """Yield the tensors in `tree`, and their owners."""
    for leaf in pytree.tree_leaves(tree):
        if isinstance(leaf, Tensor):
            yield Followed(leaf)
        elif isinstance(leaf, Split):
            yield from leaf.followed()


def columns_of(where: str, tree: Any) -> Columns:
    """Return `tree` as tensors with one entry for each sample, see `Split.columns`."""
    structure = pytree.tree_structure(tree)
    columns, leaves = joined([_columns_of_leaf(path, leaf) for path, leaf in leaves_of(where, tree)])
    return columns, lambda entries: pytree.tree_unflatten(leaves(entries), structure)


def joined(parts: list[Columns]) -> Columns:
    """Return the columns of several parts whose samples are lists."""

    def sample(entries: list[Tensor]) -> list[Any]:
        left = iter(entries)
        return [of_entries([next(left) for _ in columns]) for columns, of_entries in parts]

    return [column for columns, _ in parts for column in columns], sample


def column_of(tensor: Tensor, dim: int) -> Column:
    """Return the column of a tensor whose samples are along `dim`; its entries have one row there."""
    return Column(tensor, tensor.unsqueeze(dim + 1), dim)


def _columns_of_leaf(where: str, leaf: Any) -> Columns:
    if isinstance(leaf, Tensor):
        return [column_of(leaf, 0)], lambda entries: entries[0]
    return leaf.columns(where) if isinstance(leaf, Split) else ([], lambda entries: leaf)


def kind_of(tree: Any, other: Callable[[Any], Hashable] = repr) -> Hashable:
    """Return a key that trees of the same kind share; `other` gives it for leaves without tensors."""
    leaves, structure = pytree.tree_flatten(tree)

    def of_leaf(leaf: Any) -> Hashable:
        if isinstance(leaf, Tensor):
            return kind_of_tensor(leaf)
        return leaf.kind() if isinstance(leaf, Split) else other(leaf)

    return str(structure), *map(of_leaf, leaves)


def kind_of_tensor(tensor: Tensor) -> Hashable:
    """Return a key that tensors of batches of the same kind share."""
    return tensor.dtype, tensor.dim(), tensor.requires_grad
