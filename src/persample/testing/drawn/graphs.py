"""Hypothesis strategy for whole problems: directed graphs of layers with branches, joins and reuse; and losses."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor, nn

from persample.testing.devices import set_seed
from persample.testing.drawn.functions import Function
from persample.testing.drawn.layers import Draw, Shape, activation_in_place, embedding, layers, output_shape
from persample.testing.drawn.losses import losses
from persample.testing.drawn.operations import operations
from persample.testing.problem import Problem

_LARGEST = 300  # numbers in one value of one sample, which keeps a problem at some milliseconds
_VOCABULARY = 5
_LAYERS_THAT_BEAR_CHANGES = (nn.Linear, nn.modules.conv._ConvNd, nn.GroupNorm, nn.LayerNorm)


class Graph(nn.Module):
    """Value after value, each of the values before: `value = step(*values)`. The last one is the output.

    Args:
        steps: pairs of a module and of the numbers of the values that it is given; the inputs are the first values.
        inputs: how many inputs there are.
    """

    def __init__(self, steps: Sequence[tuple[nn.Module, tuple[int, ...]]], inputs: int) -> None:
        super().__init__()
        self.steps = nn.ModuleList(step for step, _ in steps)
        self.sources = [sources for _, sources in steps]
        self.inputs = inputs

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """Return the last value."""
        values = [*args, *kwargs.values()]
        for step, sources in zip(self.steps, self.sources, strict=True):
            values.append(step(*(values[s] for s in sources)))
        return values[-1]

    def extra_repr(self) -> str:
        """Return which step is given what."""
        lines = [f"v{self.inputs + n} = steps[{n}](v{', v'.join(map(str, s))})" for n, s in enumerate(self.sources)]
        return "\n".join(lines)


@st.composite
def problems(draw: Draw, anything: bool = True) -> Problem:
    """A graph of one to six steps, a batch of one to five samples, and a loss.

    Args:
        draw: given by hypothesis.
        anything: whether layers and uses of parameters occur that backends with rules for layers may refuse. Without
            them, such a backend must serve all.
    """
    seed = draw(st.integers(0, 2**16))
    with torch.random.fork_rng():
        set_seed(seed)
        size = draw(st.integers(1, 5))
        growing = _Growing(draw, anything)
        inputs = growing.inputs(size)
        for _ in range(draw(st.integers(1, 6))):
            growing.step()
        growing.end()
        model = Graph(growing.steps, len(inputs)).double()
        for parameter in model.parameters():
            # Away from the ones and zeros of initialisation, at which some errors vanish.
            parameter.data += 0.3 * torch.randn_like(parameter)
            if draw(st.integers(0, 7)) == 0:
                parameter.requires_grad_(False)
        loss = draw(losses(size, growing.shapes[-1]))
        given = draw(st.sampled_from(["tuple", "dict"])) if len(inputs) > 1 else "tensor"
    forms = {"tensor": inputs[0], "tuple": tuple(inputs), "dict": {f"x{n}": x for n, x in enumerate(inputs)}}
    return Problem(model, forms[given], loss.targets, loss.given, loss.plain, seed)


class _Growing:
    """A graph while it is drawn.

    Attributes:
        shapes: of one sample of each value.
        steps: the modules, and the numbers of the values that they are given.
        floating: the numbers of the values that are no indices.
    """

    def __init__(self, draw: Draw, anything: bool) -> None:
        self.draw = draw
        self.anything = anything
        self.shapes: list[Shape] = []
        self.steps: list[tuple[nn.Module, tuple[int, ...]]] = []
        self.floating: list[int] = []

    def inputs(self, size: int) -> list[Tensor]:
        """Draw one or two inputs; indices go through an embedding at once."""
        values: list[Tensor] = []
        for _ in range(self.draw(st.integers(1, 2))):
            if self.draw(st.integers(0, 2)) == 0:
                shape: Shape = self.draw(_token_shapes)
                values.append(torch.randint(_VOCABULARY, (size, *shape)))
            else:
                shape = self.draw(_shapes)
                values.append(torch.randn(size, *shape).double())
            self.shapes.append(shape)
        for number, value in enumerate(values):
            if not value.is_floating_point():
                table = self.draw(embedding(_VOCABULARY))
                self._append(table, number, shape=(*self.shapes[number], table.embedding_dim))
        self.floating = [n for n in range(len(values)) if values[n].is_floating_point()]
        self.floating += range(len(values), len(self.shapes))
        return values

    def step(self) -> None:
        """Draw one more value."""
        source = self._pick(self.floating)
        kinds: list[Callable[[int], bool]] = [self._layer, self._layer, self._reuse, self._twin, self._join]
        kind = self.draw(st.sampled_from(kinds))
        if not kind(source):
            self._layer(source)
        assume(0 < torch.Size(self.shapes[-1]).numel() <= _LARGEST)
        self.floating.append(len(self.shapes) - 1)

    def end(self) -> None:
        """Join the last value with another one, or leave all others without effect."""
        if self.draw(st.booleans()):
            last, other = len(self.shapes) - 1, self._pick(self.floating)
            join = Function("flattened side by side", lambda x, y: torch.cat([x.flatten(1), y.flatten(1)], 1))
            self._append(join, last, other)

    def _layer(self, source: int) -> bool:
        shape = self.shapes[source]
        strange = self.anything and self.draw(st.booleans())
        module = self.draw(operations(shape) if strange else layers(shape))
        if isinstance(module, _LAYERS_THAT_BEAR_CHANGES) and self.draw(st.integers(0, 3)) == 0:
            module = nn.Sequential(module, self.draw(activation_in_place()))
        self._append(module, source)
        return True

    def _reuse(self, source: int) -> bool:
        """Use a module once more, on a value of a shape that it knows."""
        known = [m for m, s in self.steps if len(s) == 1 and self.shapes[s[0]] == self.shapes[source] and _trained(m)]
        if known:
            self._append(self.draw(st.sampled_from(known)), source)
        return bool(known)

    def _twin(self, source: int) -> bool:
        """Use another module of the same kind with the same parameters."""
        known = [m for m, s in self.steps if len(s) == 1 and self.shapes[s[0]] == self.shapes[source] and _trained(m)]
        if known:
            self._append(_tied(self.draw(st.sampled_from(known))), source)
        return bool(known)

    def _join(self, source: int) -> bool:
        """Join two values of one shape, or one value with a reduced one."""
        shape = self.shapes[source]
        others = [n for n in self.floating if self.shapes[n] == shape]
        dim = self.draw(st.integers(1, len(shape)))
        functions: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
            "add": lambda x, y: x + y,
            "subtract": lambda x, y: x - y.tanh(),
            "multiply": lambda x, y: x * y.sigmoid(),
            "cat": lambda x, y: torch.cat([x, y], dim),
        }
        if self.anything:
            functions |= {
                "stack": lambda x, y: torch.stack([x, y], dim),
                "maximum": torch.maximum,
                "add in place": lambda x, y: x.sin().add_(y),
                "broadcast": lambda x, y: x + y.mean(dim, keepdim=True),
                "lerp": lambda x, y: torch.lerp(x, y, 0.3),
                "einsum": lambda x, y: torch.einsum("b...,b...->b", x, y)[:, None],
            }
            if len(shape) >= 2:
                functions["matmul"] = lambda x, y: x @ y.mT.tanh()
        name = self.draw(st.sampled_from(sorted(functions)))
        self._append(Function(name, functions[name]), source, self._pick(others))
        return True

    def _append(self, module: nn.Module, *sources: int, shape: Shape | None = None) -> None:
        self.steps.append((module, sources))
        self.shapes.append(shape or output_shape(module.double(), *(self.shapes[s] for s in sources)))

    def _pick(self, values: Sequence[int]) -> int:
        """One of `values`; the last one where all else is simple."""
        return values[-1 - self.draw(st.integers(0, len(values) - 1))]


_shapes: st.SearchStrategy[Shape] = st.one_of(
    st.tuples(st.integers(1, 6)),
    st.tuples(st.integers(1, 4), st.integers(1, 6)),
    st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(1, 6)),
    st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4)),
)
_token_shapes: st.SearchStrategy[Shape] = st.one_of(
    st.just(()), st.tuples(st.integers(1, 6)), st.tuples(st.integers(1, 3), st.integers(1, 3))
)


def _trained(module: nn.Module) -> bool:
    return any(True for _ in module.parameters()) and not isinstance(module, nn.Embedding)


def _tied(module: nn.Module) -> nn.Module:
    """Another module of the same kind with the same parameters."""
    twin = copy.deepcopy(module)
    for owner, original in zip(twin.modules(), module.modules(), strict=True):
        for name in owner._parameters:
            owner._parameters[name] = original._parameters[name]
    return twin
