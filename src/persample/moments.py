"""What a source returns: the mean gradient and the mean squared gradient of the single samples of a mini-batch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, overload

import torch
from torch import Tensor

from persample.dtypes import at_least_float32
from persample.errors import UsageError
from persample.quantities.parts import Per, members

_ROW = 512


@dataclass(frozen=True)
class Moments:
    """First and second moment of the per-sample gradients of one mini-batch of B samples.

    With g_i the gradient of the loss of sample i alone, no 1/B anywhere in g_i:

    Attributes:
        losses: the B losses, detached, shape `(B,)`.
        mean: Σ_i g_i / B for each parameter, keyed by its name in `model.named_parameters()`.
        second_moment: Σ_i g_i² / B (element by element), with the same keys and shapes.
    """

    losses: Tensor
    mean: Mapping[str, Tensor]
    second_moment: Mapping[str, Tensor]

    @property
    def batch_size(self) -> int:
        """The number of samples B that the moments are averaged over."""
        return len(self.losses)

    def variance(self) -> dict[str, Tensor]:
        """Return Σ_i (g_i − ḡ)² / (B − 1), element by element, for each parameter.

        Where it is much smaller than ḡ², it has as many digits fewer.

        Raises:
            UsageError: there is but one sample.
        """
        self._refuse_single()
        factor = self.batch_size / (self.batch_size - 1)
        return {
            name: (factor * (self.second_moment[name] - mean.square())).clamp_(min=0)
            for name, mean in self.mean.items()
        }

    def _refuse_single(self) -> None:
        if self.batch_size < 2:
            raise UsageError(
                "The variance of one gradient is not defined: compute the moments of at least two samples."
            )

    @overload
    def noise_scale(self, per: None = None) -> float: ...

    @overload
    def noise_scale(self, per: Literal["parameter"] | Mapping[str, Iterable[str]]) -> dict[str, float]: ...

    def noise_scale(self, per: Per = None) -> float | dict[str, float]:
        """Return the batch size at which the noise of the mean gradient equals the gradient: B_simple.

        It is tr Σ / ‖G‖², with Σ the covariance of the gradients of single samples and G their expectation, and with
        estimates of both that are unbiased whatever the batch size (McCandlish et al., "An Empirical Model of
        Large-Batch Training", 2018):

            tr Σ ≈ Σ_j B/(B − 1) (h_j − ḡ_j²)        ‖G‖² ≈ ‖ḡ‖² − tr Σ / B

        Of a small batch the second is noisy; infinity is returned where it is not positive. The expectation of their
        ratio is not that of the ratio of expectations, so over several batches merge the moments first
        (`merge_moments`).

        Args:
            per: None for the noise scale of all parameters together; `"parameter"` for that of each; or a dict of the
                names of parameters (or of modules) by group, for that of each group.

        Raises:
            UsageError: there is but one sample.
            OptionError: `per` names no parameter of these moments.
        """
        self._refuse_single()
        if per is None:
            return self._noise_scale(self.mean)
        return {group: self._noise_scale(names) for group, names in members(per, self.mean).items()}

    def _noise_scale(self, names: Iterable[str]) -> float:
        squares = _in_float64([_sum_of(self.second_moment[name]) for name in names]).sum().item()
        total = _in_float64([part for name in names for part in _norms_in(self.mean[name])]).square().sum().item()
        trace = max(0.0, (squares - total) * self.batch_size / (self.batch_size - 1))
        squared_norm = total - trace / self.batch_size
        return trace / squared_norm if squared_norm > 0 else math.inf


# To read all numbers as float64 would take three times as long: what is made of many is put together in float64.


def _sum_of(numbers: Tensor) -> Tensor:
    """Return the sum of numbers that are not negative, which PyTorch adds up in pairs."""
    return numbers.sum(dtype=torch.promote_types(numbers.dtype, torch.float32)).view(1)


def _norms_in(numbers: Tensor) -> list[Tensor]:
    """Return numbers with the same sum of squares: the norms of rows of 512, and those that are left over."""
    flat = at_least_float32(numbers).reshape(-1)
    left_over = flat.numel() % _ROW
    if left_over == flat.numel():
        return [flat]
    rows, rest = flat.split([flat.numel() - left_over, left_over])
    return [torch.linalg.vector_norm(rows.view(-1, _ROW), dim=1), rest]


def _in_float64(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.to(parts[0].device) for part in parts] or [torch.zeros(0)]).double()


def merge_moments(parts: Iterable[Moments]) -> Moments:
    """Return the moments over all samples of `parts`: micro-batches of one batch, or draws of the weights.

    A part of B_k samples has the weight B_k / Σ_k B_k, so micro-batches of different sizes give exactly what the
    whole batch would have given.

    Raises:
        UsageError: there is no part, or the parts belong to different parameters.
    """
    parts = list(parts)
    if not parts:
        raise UsageError("merge_moments() was given no moments: pass at least one Moments object.")
    names = parts[0].mean.keys()
    for part in parts[1:]:
        if part.mean.keys() != names:
            other = sorted(names ^ part.mean.keys())
            raise UsageError(
                f"merge_moments() was given moments of different parameters (only in some: {', '.join(other)}): "
                "merge only what comes from the same model."
            )
    size = sum(part.batch_size for part in parts)
    weights = [part.batch_size / size for part in parts]
    return Moments(
        losses=torch.cat([part.losses for part in parts]),
        mean=_weighted_sums([part.mean for part in parts], weights),
        second_moment=_weighted_sums([part.second_moment for part in parts], weights),
    )


def _weighted_sums(parts: list[Mapping[str, Tensor]], weights: list[float]) -> dict[str, Tensor]:
    sums = {}
    for name, first in parts[0].items():
        total = weights[0] * first
        for part, weight in zip(parts[1:], weights[1:], strict=True):
            total.add_(part[name], alpha=weight)
        sums[name] = total
    return sums
