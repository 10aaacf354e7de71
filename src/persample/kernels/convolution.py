"""Per-sample weight gradients of a convolution, in whichever exact form is the fastest for its shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from persample.kernels.autotune import Key, choose
from persample.kernels.convolution_forms import forms
from persample.kernels.gpu import by_triton, kernels_for
from persample.kernels.images import Images, arguments, checked
from persample.kernels.library import operator
from persample.kernels.pieces import Sums

_ARGUMENTS = (
    "(Tensor x, Tensor delta, SymInt[] kernel_size, SymInt[] stride, SymInt[] padding, SymInt[] dilation, "
    "SymInt groups, SymInt images)"
)


def _fake_moments(*arguments: Any) -> Sums:
    c = checked(*arguments)
    return c.delta.new_empty(c.geometry.weight), c.delta.new_empty(c.geometry.weight)


def _fake_norms(*arguments: Any) -> Tensor:
    c = checked(*arguments)
    return c.delta.new_empty(len(c.delta) // c.images)


def _fake_moments_and_norms(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return *_fake_moments(*arguments), _fake_norms(*arguments)


def _fake_per_sample(*arguments: Any) -> Tensor:
    c = checked(*arguments)
    return c.delta.new_empty(len(c.delta) // c.images, *c.geometry.weight)


@operator(f"convolution_moments{_ARGUMENTS} -> (Tensor, Tensor)", _fake_moments)
def convolution_moments(*arguments: Any) -> Sums:
    """Return Σ_i g_i and Σ_i g_i², each `(O, C/G, *K)`, for x `(B·R, C, *S)` and δ `(B·R, O, *L)`; see `arguments`."""
    c = checked(*arguments)
    return choose(key_of("convolution", c), lambda: _moments(c), c)


@operator(f"convolution_squared_norms{_ARGUMENTS} -> Tensor", _fake_norms)
def convolution_squared_norms(*arguments: Any) -> Tensor:
    """Return ‖g_i‖², `(B,)`, of the same."""
    c = checked(*arguments)
    return choose(key_of("norms of a convolution", c), lambda: _norms(c), c)[0]


@operator(f"convolution_moments_and_norms{_ARGUMENTS} -> (Tensor, Tensor, Tensor)", _fake_moments_and_norms)
def convolution_moments_and_norms(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return Σ_i g_i, Σ_i g_i² and ‖g_i‖² of the same, of gradients that are formed once for all three."""
    c = checked(*arguments)
    return choose(key_of("moments and norms of a convolution", c), lambda: _moments_and_norms(c), c)


@operator(f"convolution_per_sample{_ARGUMENTS} -> Tensor", _fake_per_sample)
def convolution_per_sample(*arguments: Any) -> Tensor:
    """Return g_i, `(B, O, C/G, *K)`, of the same."""
    c = checked(*arguments)
    return choose(key_of("gradients of a convolution", c), lambda: per_sample_forms(c), c)[0]


def key_of(what: str, c: Images) -> Key:
    """Return what decides which form of something is the fastest."""
    lengths = (len(c.x) // c.images, *c.x.shape[2:], *c.delta.shape[2:])
    return Key((what, c.geometry, c.images, c.x.dtype, c.x.device), lengths)


def _moments(c: Images) -> dict[str, Callable[[Images], Sums]]:
    found: dict[str, Callable[[Images], Sums]] = {name: form.moments for name, form in forms(c).items()}
    triton = kernels_for(c.x)
    if triton is None or c.x.dim() == 5:
        return found
    form = {"triton": lambda c: by_triton(triton.convolution_moments, *arguments(c))}
    return form | found if min(c.geometry.weight[:2]) >= 16 else found | form


def _norms(c: Images) -> dict[str, Callable[[Images], tuple[Tensor]]]:
    return {name: form.norms for name, form in forms(c).items()}


def _moments_and_norms(c: Images) -> dict[str, Callable[[Images], tuple[Tensor, Tensor, Tensor]]]:
    return {name: form.moments_and_norms for name, form in forms(c).items()}


def per_sample_forms(c: Images) -> dict[str, Callable[[Images], tuple[Tensor]]]:
    """The forms of g_i."""
    return {name: form.per_sample for name, form in forms(c).items()}
