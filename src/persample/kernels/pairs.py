"""The products of all pairs of gradients, g_i·h_j."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from persample.kernels.autotune import COMPILED, Key, choose
from persample.kernels.library import operator
from persample.kernels.onednn import product_for

_WORTH_A_TRIAL = 2**16  # numbers in g


def _check(g: Tensor, h: Tensor) -> None:
    if g.dim() != 2 or h.dim() != 2 or g.shape[1] != h.shape[1]:
        shapes = f"{tuple(g.shape)} and {tuple(h.shape)}"
        raise ValueError(f"gradients of shapes {shapes}: they must be (n, P) and (m, P).")


def _fake(g: Tensor, h: Tensor) -> Tensor:
    _check(g, h)
    return g.new_empty(len(g), len(h))


@operator("products_of_pairs(Tensor g, Tensor h) -> Tensor", _fake)
def products_of_pairs(g: Tensor, h: Tensor) -> Tensor:
    """Return g_i·h_j, `(n, m)`, for g `(n, P)` and h `(m, P)`, by the fastest product."""
    _check(g, h)
    if g.numel() < _WORTH_A_TRIAL:
        return g @ h.mT
    return choose(Key(("pairs", g.shape[1], g.dtype, g.device), (len(g), len(h))), lambda: forms(g), g, h)[0]


def forms(g: Tensor) -> dict[str, Callable[[Tensor, Tensor], tuple[Tensor]]]:
    """Forms for gradients like `g`, the likely winner first."""
    found: dict[str, Callable[[Tensor, Tensor], tuple[Tensor]]] = {}
    product = product_for(g)
    if product is not None:
        found[COMPILED] = lambda g, h: (product(g, h),)
    return found | {"blas": lambda g, h: (g @ h.mT,)}
