"""Indexing as PyTorch reads it: parameters, samples and constants in front of the brackets, anything in them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

import persample
from persample.testing.devices import generator_of, on_cuda

Draw = Callable[[st.SearchStrategy[Any]], Any]
Part = Callable[[Tensor], Any]
"""Makes one part of an index from the numbers of the samples, shape `(B, 3, L)`."""

BATCH, LENGTH, SIZES = 3, 2, (3, 2, 4)  # two of the sizes are those of the batch and of the positions


@dataclass(frozen=True)
class Drawn:
    """Parts of an index.

    Attributes:
        parts: make them.
        text: says what they are.
        moving: whether a part has an entry for each sample.
    """

    parts: tuple[Part, ...]
    text: str
    moving: bool

    def __call__(self, numbers: Tensor) -> Any:
        return tuple(part(numbers) for part in self.parts)

    def __repr__(self) -> str:
        return self.text


@st.composite
def indices(draw: Draw, shape: tuple[int, ...], samples: int | None = None) -> Drawn:
    """Parts for the dimensions of `shape`; numbers of samples are `(B,)`, `(B, L)` or `(L, B)`.

    Args:
        draw: given by hypothesis.
        shape: of what is indexed.
        samples: the dimension that has an entry for each sample, which stays; None if there is none.
    """
    form = draw(st.sampled_from(["B", "B L", "L B"]))
    widths = (1, LENGTH) if form == "B L" else (1,)
    whole = draw(st.booleans())  # whether the samples' own dimension stays whole
    parts: list[Part] = []
    names: list[str] = []
    moving, dots, dim = False, False, 0

    def add(name: str, part: Part) -> None:
        parts.append(part)
        names.append(name)

    while dim < len(shape):
        size = shape[dim]
        kinds = ["integer", "slice", "none", "numbers", "list", "scalar", "mask", "array"]
        kinds += [] if dots else ["dots", "dots"]
        kinds += ["samples", "samples"] if samples is None or not whole else []
        kind = draw(st.sampled_from(kinds)) if dim != samples else "all" if whole else "each"
        number, width = draw(st.integers(-size, size - 1)), draw(st.sampled_from(widths))
        several = draw(st.lists(st.integers(-size, size - 1), min_size=width, max_size=width))
        if kind == "all":
            add(":", lambda n: slice(None))
        elif kind == "each":
            add("each", lambda n: _of_samples(torch.arange(len(n)).unsqueeze(1), form))
            moving = True
        elif kind == "samples":
            column = draw(st.integers(0, 2))
            add(f"samples[{column}]", lambda n, c=column, s=size: _of_samples(n[:, c], form) % s)
            moving = True
        elif kind == "integer":
            add(str(number), lambda n, v=number: v)
        elif kind == "slice":
            ends = draw(st.sampled_from([(None, None, None), (1, None, None), (None, -1, None), (None, None, 2)]))
            assume(len(range(size)[slice(*ends)]))
            add(str(slice(*ends)), lambda n, e=ends: slice(*e))
        elif kind == "none":
            add("None", lambda n: None)
            dim -= 1
        elif kind == "dots":
            add("...", lambda n: Ellipsis)
            dots = True
            stop = samples if samples is not None and not whole and dim <= samples else len(shape)
            dim = draw(st.integers(dim, stop)) - 1
        elif kind == "numbers":
            add(f"tensor({several})", lambda n, v=several: torch.tensor(v))
        elif kind == "list":
            add(str(several), lambda n, v=several: list(v))
        elif kind == "array":
            add(f"array({several})", lambda n, v=several: np.array(v))
        elif kind == "scalar":
            add(f"scalar({number})", lambda n, v=number: torch.tensor(v))
        else:
            wide = dim + 1 < len(shape) and dim + 1 != samples and draw(st.booleans())
            mask = torch.zeros(shape[dim : dim + 1 + wide], dtype=torch.bool)
            assume(width <= mask.numel())
            mask.view(-1)[torch.randperm(mask.numel(), generator=generator_of(number % 7))[:width]] = 1
            add(f"mask({mask.tolist()})", lambda n, m=mask: m)
            dim += wide
        dim += 1
        if not dots and dim > (0 if whole else samples or 0) and draw(st.integers(0, 5)) == 0:
            break  # what is left out stays whole
    return Drawn(tuple(parts), ", ".join(names), moving)


def _of_samples(numbers: Tensor, form: str) -> Tensor:
    return numbers[:, 0] if form == "B" else numbers if form == "B L" else numbers.T


class Indexed(nn.Module):
    """A table, a layer, and a function of them, the samples and their numbers."""

    def __init__(self, function: Callable[[Any, Tensor, Tensor], Tensor], shape: tuple[int, ...]) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(shape))
        self.layer = nn.Linear(4, torch.Size(shape).numel())
        self.register_buffer("constant", torch.randn(shape))
        self.function, self.shape, self.dim = function, shape, 0

    def forward(self, x: Tensor, numbers: Tensor) -> Tensor:
        return self.function(self, x, numbers).movedim(self.dim, 0)


def loss_fn(outputs: Tensor, targets: Any = None) -> Tensor:
    flat = outputs.reshape(len(outputs), -1)
    return (flat.sin() * torch.linspace(1, 2, flat.shape[1], dtype=flat.dtype)).sum(1)


def assert_exact(function: Callable[[Any, Tensor, Tensor], Tensor], shape: tuple[int, ...], batch: int = BATCH) -> None:
    """Compare with one backward pass for each sample."""
    torch.manual_seed(0)
    model = Indexed(function, shape).double()
    x, numbers = torch.randn(batch + 2, 4).double(), torch.randint(4, (batch + 2, 3, LENGTH))
    with torch.no_grad():
        short, long = function(model, x[:batch], numbers[:batch]).shape, function(model, x, numbers).shape
    assert len(short) == len(long)
    assert short != long, "no sample takes part"
    model.dim = next(d for d in range(len(short)) if short[d] != long[d])
    x, numbers = x[:batch], numbers[:batch]
    losses, rows = [], []
    for i in range(batch):
        losses.append(loss_fn(model(x[i : i + 1], numbers[i : i + 1])).squeeze(0))
        found = torch.autograd.grad(losses[-1], list(model.parameters()), allow_unused=True)
        rows.append([torch.zeros_like(p) if g is None else g for p, g in zip(model.parameters(), found, strict=True)])
    source = persample.make_source("fused", model, loss_fn, check="never")
    claimed, moments = source.per_sample((x, numbers), None), source.moments((x, numbers), None)
    torch.testing.assert_close(moments.losses, torch.stack(losses).detach(), rtol=1e-12, atol=1e-12)
    for (name, g), *expected in zip(claimed.items(), *rows, strict=True):
        torch.testing.assert_close(g, torch.stack(expected), rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


SHAPES = st.sampled_from([SIZES[:1], SIZES[:2], SIZES, (4, 3), (2, 2, 3)])


@st.composite
def lookups(draw: Draw) -> tuple[tuple[int, ...], Drawn]:
    shape = draw(SHAPES)
    index = draw(indices(shape))
    assume(index.moving)
    return shape, index


@given(lookups())
def test_a_parameter_looked_up_by_samples(drawn: tuple[tuple[int, ...], Drawn]) -> None:
    shape, index = drawn
    assert_exact(lambda m, x, n: m.table[index(n)], shape)


@given(lookups())
def test_a_constant_looked_up_by_samples(drawn: tuple[tuple[int, ...], Drawn]) -> None:
    """What is looked up of constants belongs to the samples, so that parameters can use it."""
    shape, index = drawn

    def function(m: Any, x: Tensor, n: Tensor) -> Tensor:
        found = m.constant[index(n)]
        return found.unsqueeze(-1) @ m.table.flatten()[:1].unsqueeze(0)

    assert_exact(function, shape)


@st.composite
def of_samples(draw: Draw) -> tuple[tuple[int, ...], int, Drawn]:
    """The shape of a sample, the dimension in which the samples stand, and an index that leaves them apart."""
    shape = draw(SHAPES)
    place = draw(st.integers(0, len(shape)))
    return shape, place, draw(indices((*shape[:place], BATCH + 2, *shape[place:]), place))


def _samples(model: Any, x: Tensor, place: int) -> Tensor:
    """Samples in another dimension than the first, which depend on the parameters."""
    return model.layer(x).unflatten(1, model.shape).movedim(0, place)


@pytest.mark.skipif(torch.__version__ < "2.11", reason="2.8 takes entries of another dimension behind a mask of two")
@given(of_samples())
def test_samples_indexed(drawn: tuple[tuple[int, ...], int, Drawn]) -> None:
    shape, place, index = drawn
    assert_exact(lambda m, x, n: _samples(m, x, place)[index(n)] * m.table.flatten()[0], shape)


@pytest.mark.parametrize("value", ["number", "parameter", "samples"])
@given(of_samples())
def test_written_into_samples(value: str, drawn: tuple[tuple[int, ...], int, Drawn]) -> None:
    shape, place, index = drawn

    def function(m: Any, x: Tensor, n: Tensor) -> Tensor:
        h = _samples(m, x, place).sin()
        part = h[index(n)]
        values = {"number": 1.5, "parameter": m.table.flatten()[1], "samples": part.detach().cos() * part}
        h[index(n)] = values[value]
        return h * m.table.flatten()[0]

    assert_exact(function, shape)


def _each(n: Tensor) -> Tensor:
    return torch.arange(len(n))


def _zeros(x: Tensor) -> Tensor:
    return x.new_zeros(len(x), 4)


def written(m: Any, h: Tensor, index: Any, value: Any) -> Tensor:
    """`h[index] = value`, and a parameter that uses the whole."""
    h[index] = value
    return h @ m.table


# In the brackets of a table (4, 3).
OTHERS: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "a leading ellipsis": lambda m, x, n: m.table[..., n[:, 0] % 3],
    "an ellipsis for nothing": lambda m, x, n: m.table[n[:, 0], ..., n[:, 1] % 3],
    "a list read as a tuple": lambda m, x, n: m.table[[n[:, 0], [0, 2]]],
    "a truth value": lambda m, x, n: m.table[True, n[:, 0]],
    "a truth value apart": lambda m, x, n: m.table[n[:, 0], None, True],
    "scalars of samples": lambda m, x, n: torch.stack([m.table[:, n[i, 0, 0] % 3] for i in range(len(n))]),
    "scalars of samples in a list": lambda m, x, n: torch.stack([m.table[[n[i, 0, 0]]] for i in range(len(n))]),
    "a mask of each sample": lambda m, x, n: torch.stack([m.table[x[i] > 0].sum() for i in range(len(x))]),
    "a mask of all samples": lambda m, x, n: (
        torch.zeros(len(x), 4).to(x).masked_scatter(x > 0, m.table[:, 0].expand(len(x), -1)[x > 0])
    ),
    "index_select": lambda m, x, n: m.table.index_select(1, n[:, 0, 0] % 3).T,
    "gather": lambda m, x, n: m.table.unsqueeze(0).expand(len(n), -1, -1).gather(2, n[:, :1].expand(-1, 4, -1) % 3),
    "take": lambda m, x, n: m.table.take(n),
    "take_along_dim": lambda m, x, n: torch.take_along_dim(m.table, n[:, :1, 0].T % 3, 1).T,
    # Written where the samples say.
    "one of each": lambda m, x, n: written(m, _zeros(x), (_each(n), n[:, 0, 0]), 1.0),
    "where a mask says": lambda m, x, n: written(m, _zeros(x), x > 0, 2.0),
    "a parameter": lambda m, x, n: written(m, _zeros(x), (_each(n), n[:, 0, 0]), m.table[0, 0]),
    "a parameter where a mask says": lambda m, x, n: written(m, _zeros(x), x > 0, m.table[0, 0]),
    "samples": lambda m, x, n: written(m, _zeros(x), (_each(n), n[:, 0, 0]), m.layer(x)[:, 0]),
    "scattered": lambda m, x, n: _zeros(x).scatter_(1, n[:, 0], 1.0) @ m.table,
    "counted": lambda m, x, n: _zeros(x).scatter_add_(1, n[:, 0], torch.ones(len(n), LENGTH).to(x)) @ m.table,
    "put": lambda m, x, n: _zeros(x).index_put((_each(n), n[:, 0, 0]), torch.ones(()).to(x)) @ m.table,
    "added": lambda m, x, n: (
        _zeros(x).index_put((_each(n).unsqueeze(1), n[:, 0]), m.table[0, :LENGTH].exp(), accumulate=True) @ m.table
    ),
}


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence:UserWarning")
@pytest.mark.parametrize("name", OTHERS)
def test_other_ways(name: str) -> None:
    assert_exact(OTHERS[name], (4, 3))


@pytest.mark.skipif(on_cuda(), reason="ends all further work on the GPU")
def test_an_index_out_of_range_is_the_error_of_pytorch() -> None:
    model = Indexed(lambda m, x, n: m.table[n[:, 0] + 4], (4, 3))
    with pytest.raises(IndexError, match="out of bounds"):
        persample.make_source("fused", model, loss_fn).moments((torch.randn(3, 4), torch.ones(3, 3, 2).long()), None)
