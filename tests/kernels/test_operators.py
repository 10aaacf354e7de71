"""The operators against PyTorch's own checks of operators, and against the gradients of single samples in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from persample.kernels import convolution, linear, lookups, outer, pooling, terms
from persample.kernels.library import ON_ANY_DEVICE

WINDOWS = ([3, 2], [2, 1], [1, 0], [1, 2], 2, 2)


def linear_arguments(batch: int, positions: int, outputs: int = 4, inputs: int = 3) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, positions, inputs), torch.randn(batch, positions, outputs)


def outer_arguments(groups: int, positions: int, batch: int = 5) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, groups, 4, positions), torch.randn(batch, groups, 3, positions)


def convolution_arguments(batch: int = 3) -> tuple[Any, ...]:
    x = torch.randn(2 * batch, 4, 7, 6)
    return x, torch.randn_like(F.conv2d(x, torch.zeros(6, 2, 3, 2), None, *WINDOWS[1:5])), *WINDOWS


def of_linear(x: Tensor, delta: Tensor) -> Tensor:
    return torch.einsum("blo,bli->boi", delta, x)


def of_outer(delta: Tensor, a: Tensor) -> Tensor:
    return torch.einsum("bgol,bgil->bgoi", delta, a)


def of_lookups(indices: Tensor, delta: Tensor, count: int) -> Tensor:
    held = F.one_hot(indices, count).to(delta)
    return torch.einsum("blv,bld->bvd", held, delta)


def of_convolution(x: Tensor, delta: Tensor, kernel: list[int], *rest: Any) -> Tensor:
    stride, padding, dilation, groups, images = rest
    weight = torch.zeros(delta.shape[1], x.shape[1] // groups, *kernel, dtype=x.dtype, requires_grad=True)
    rows = []
    for start in range(0, len(x), images):
        own = slice(start, start + images)
        result = (F.conv1d, F.conv2d, F.conv3d)[len(kernel) - 1](
            x[own], weight, None, stride, padding, dilation, groups
        )
        rows.append(torch.autograd.grad(result, weight, delta[own])[0])
    return torch.stack(rows)


#: name: operators of moments and of norms, gradients of single samples, arguments
CASES: dict[str, tuple[Callable[..., Any], Callable[..., Any] | None, Callable[..., Tensor], Callable[[], Any]]] = {
    "terms": (terms.term_moments, None, lambda t: t.sum(1), lambda: (torch.randn(5, 3, 2, 4),)),
    "one term": (terms.term_moments, None, lambda t: t.sum(1), lambda: (torch.randn(5, 1, 4),)),
    "no term": (terms.term_moments, None, lambda t: t.sum(1), lambda: (torch.randn(5, 0, 4),)),
    "linear": (linear.linear_moments, linear.linear_squared_norms, of_linear, lambda: linear_arguments(5, 1)),
    "linear on positions": (
        *(linear.linear_moments, linear.linear_squared_norms, of_linear),
        lambda: linear_arguments(5, 6),
    ),
    "linear, many outputs": (
        *(linear.linear_moments, linear.linear_squared_norms, of_linear),
        lambda: linear_arguments(5, 2, 40, 30),
    ),
    "linear, no position": (
        *(linear.linear_moments, linear.linear_squared_norms, of_linear),
        lambda: linear_arguments(5, 0),
    ),
    "outer": (outer.outer_moments, outer.outer_squared_norms, of_outer, lambda: outer_arguments(2, 6)),
    "outer, one group": (outer.outer_moments, outer.outer_squared_norms, of_outer, lambda: outer_arguments(1, 6)),
    "outer, one position": (outer.outer_moments, outer.outer_squared_norms, of_outer, lambda: outer_arguments(2, 1)),
    "outer, no position": (outer.outer_moments, outer.outer_squared_norms, of_outer, lambda: outer_arguments(2, 0)),
    "lookups": (
        *(lookups.lookup_moments, lookups.lookup_squared_norms, of_lookups),
        lambda: (torch.randint(7, (5, 6)), torch.randn(5, 6, 3), 7),
    ),
    "no lookup": (
        *(lookups.lookup_moments, lookups.lookup_squared_norms, of_lookups),
        lambda: (torch.randint(7, (5, 0)), torch.randn(5, 0, 3), 7),
    ),
    "convolution": (
        *(convolution.convolution_moments, convolution.convolution_squared_norms, of_convolution),
        convolution_arguments,
    ),
}


def precise(arguments: Any) -> list[Any]:
    return [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments]


def not_contiguous(arguments: Any) -> list[Any]:
    """The same numbers in memory that begins elsewhere and has gaps."""
    return [
        torch.stack([a, a], -1).flatten(-2)[..., ::2] if isinstance(a, Tensor) and a.is_floating_point() else a
        for a in arguments
    ]


@pytest.mark.parametrize("name", CASES)
def test_against_single_samples(name: str) -> None:
    moments, norms, gradients, make = CASES[name]
    torch.manual_seed(0)
    arguments = make()
    g = gradients(*precise(arguments))
    kept = [a.clone() if isinstance(a, Tensor) else a for a in arguments]
    for given, tolerance in ((arguments, 1e-5), (precise(arguments), 1e-10), (not_contiguous(arguments), 1e-5)):
        total, squares = moments(*given)
        torch.testing.assert_close(total.double(), g.sum(0), rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(squares.double(), g.square().sum(0), rtol=tolerance, atol=tolerance)
        if norms is not None:
            found = norms(*given).double()
            torch.testing.assert_close(found, g.flatten(1).square().sum(1), rtol=tolerance, atol=tolerance)
    assert all(torch.equal(a, k) if isinstance(a, Tensor) else a == k for a, k in zip(arguments, kept, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_opcheck(name: str) -> None:
    moments, norms, _, make = CASES[name]
    for each in filter(None, (moments, norms)):
        torch.library.opcheck(each, make())


@pytest.mark.parametrize("make", [lambda a: a, precise, not_contiguous])
def test_gradients_of_a_convolution(make: Any) -> None:
    torch.manual_seed(0)
    arguments = convolution_arguments()
    given, g = make(arguments), of_convolution(*precise(arguments))
    total, squares, norms = convolution.convolution_moments_and_norms(*given)
    rows = convolution.convolution_per_sample(*given)
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(total.double(), g.sum(0), **close)
    torch.testing.assert_close(squares.double(), g.square().sum(0), **close)
    torch.testing.assert_close(norms.double(), g.flatten(1).square().sum(1), **close)
    torch.testing.assert_close(rows.double(), g, **close)
    torch.library.opcheck(convolution.convolution_moments_and_norms, arguments)
    torch.library.opcheck(convolution.convolution_per_sample, arguments)


@pytest.mark.parametrize(("positions", "width"), [(1, 3), (4, 3), (2, 40), (6, 90)])
def test_moments_and_norms_of_a_linear_layer(positions: int, width: int) -> None:
    x, delta = torch.randn(5, positions, width), torch.randn(5, positions, 2 * width)
    g = torch.einsum("blo,bli->boi", delta.double(), x.double())
    for given in ((x, delta), (x.double(), delta.double())):
        total, squares, norms = linear.linear_moments_and_norms(*given)
        close = {"rtol": 1e-4, "atol": 1e-4} if given[0] is x else {"rtol": 1e-10, "atol": 1e-10}
        torch.testing.assert_close(total.double(), g.sum(0), **close)
        torch.testing.assert_close(squares.double(), g.square().sum(0), **close)
        torch.testing.assert_close(norms.double(), g.flatten(1).square().sum(1), **close)
    torch.library.opcheck(linear.linear_moments_and_norms, (x, delta))
    joint = linear._joint(linear._forming(delta.double(), x.double()))
    for form in joint.values():
        total, squares, norms = form(delta.double(), x.double())
        torch.testing.assert_close(squares, g.square().sum(0))
        torch.testing.assert_close(norms, g.flatten(1).square().sum(1))


@pytest.mark.parametrize(("positions", "width"), [(1, 3), (1, 200), (4, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weighted_sum_of_a_linear_layer(positions: int, width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, delta = torch.randn(5, positions, width, dtype=dtype), torch.randn(5, positions, 2 * width, dtype=dtype)
    weights = torch.rand(5)
    expected = torch.einsum("b,blo,bli->oi", *precise((weights, delta, x)))
    found = [linear.linear_weighted_sum(x, delta, weights)]
    if positions == 1:
        w = weights.to(dtype).view(-1, 1, 1)
        found += [form(delta, x, w)[0] for form in linear._weighted_forms(x).values()]
    close = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-10}
    for each in found:
        torch.testing.assert_close(each.double(), expected, **close)
    torch.library.opcheck(linear.linear_weighted_sum, (x, delta, weights))


def test_opcheck_of_the_others() -> None:
    x, delta = torch.randn(5, 6, 3), torch.randn(30, 4)
    for bias in (None, torch.randn(4)):
        torch.library.opcheck(linear.linear_outputs, (x, torch.randn(4, 3), bias))
    torch.library.opcheck(linear.linear_gradient_of_inputs, (delta, torch.randn(4, 3), [5, 6]))
    torch.library.opcheck(outer.outer_weighted_sum, (*outer_arguments(2, 6), torch.randn(5)))
    torch.library.opcheck(pooling.max_pool2d, (torch.randn(4, 3, 7, 7), [2, 2], [], [0, 0], [1, 1], False))


@pytest.mark.parametrize("positions", [1, 4])
def test_weighted_sum(positions: int) -> None:
    delta, a = outer_arguments(2, positions)
    weights = torch.randn(5)
    expected = torch.einsum("b,bgoi->goi", *precise((weights, of_outer(delta, a))))
    torch.testing.assert_close(outer.outer_weighted_sum(delta, a, weights).double(), expected, rtol=1e-5, atol=1e-5)


WRONG = {
    "terms": (terms.term_moments, (torch.zeros(3),)),
    "samples": (linear.linear_moments, (torch.zeros(3, 2, 4), torch.zeros(4, 2, 5))),
    "positions": (linear.linear_squared_norms, (torch.zeros(3, 2, 4), torch.zeros(3, 3, 5))),
    "groups": (outer.outer_moments, (torch.zeros(3, 2, 4, 5), torch.zeros(3, 1, 4, 5))),
    "indices": (lookups.lookup_moments, (torch.zeros(3, 2).long(), torch.zeros(3, 3, 5), 4)),
    "dimensions": (convolution.convolution_moments, (*convolution_arguments()[:2], [3], *WINDOWS[1:])),
    "images": (convolution.convolution_moments, (*convolution_arguments()[:2], *WINDOWS[:-1], 4)),
    "channels": (convolution.convolution_squared_norms, (*convolution_arguments()[:2], *WINDOWS[:-2], 3, 2)),
}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", WRONG)
def test_wrong_shapes_are_refused(name: str, device: str) -> None:
    call, arguments = WRONG[name]
    moved = [a.to(device) if isinstance(a, Tensor) else a for a in arguments]
    with pytest.raises(ValueError, match=r"must|equal groups"):
        call(*moved)


def test_every_operator_is_one_of_pytorch() -> None:
    for name in ON_ANY_DEVICE:
        assert str(getattr(torch.ops.persample, name).default) == f"persample.{name}.default"
