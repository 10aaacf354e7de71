"""Convolutions of one, two and three dimensions, and their transposes.

With [[a]] the unfolded input, `(B, G, C·K, L)`, a convolution is a matrix product at each of its L output positions,
so g_i = δ_i [[a]]_iᵀ = Σ_l δ_il [[a]]_ilᵀ (Jain and Khan, section 3). A transposed convolution is the adjoint of the
convolution with the same weight: there the gradient δ is unfolded, and the input takes the place of δ.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from persample.kernels.unfolding import padding_pairs, unfold
from persample.sources.backends.contributions import Contribution, OuterProducts, Terms


def convolution(module: _ConvNd, a: Tensor, delta: Tensor) -> dict[str, Contribution]:
    """Return the contributions of one call; `a` is `(B, C, *S)` and `delta` is `(B, O, *L)`."""
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    unfolded = _unfold(F.pad(a, _padding(module), mode=mode), module, delta.shape[2:])
    return {
        "weight": OuterProducts(_grouped(delta, module.groups), unfolded, module.weight.shape),
        "bias": Terms(delta.flatten(2).mT),
    }


def transposed_convolution(module: _ConvTransposeNd, a: Tensor, delta: Tensor) -> dict[str, Contribution]:
    """Return the contributions of one call; `a` is `(B, C, *L)` and `delta` is `(B, O, *S)`."""
    unfolded = _unfold(F.pad(delta, _padding(module)), module, a.shape[2:])
    return {
        "weight": OuterProducts(_grouped(a, module.groups), unfolded, module.weight.shape),
        "bias": Terms(delta.flatten(2).mT),
    }


def _unfold(x: Tensor, module: _ConvNd, positions: Sequence[int]) -> Tensor:
    return unfold(x, module.kernel_size, module.stride, module.dilation, module.groups, positions)


def _grouped(x: Tensor, groups: int) -> Tensor:
    """`(B, C, *L)` as `(B, G, C/G, L)`."""
    return x.reshape(len(x), groups, x.shape[1] // groups, -1)


def _padding(module: _ConvNd) -> list[int]:
    """Padding before and after each dimension, the last dimension first, as `F.pad` wants it."""
    pairs = padding_pairs(module.padding, module.kernel_size, module.dilation)
    return [side for pair in reversed(pairs) for side in pair]


CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED_CONVOLUTIONS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
