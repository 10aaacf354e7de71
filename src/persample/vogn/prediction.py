"""Predictions averaged over draws of the weights, and their uncertainty."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, TypeAlias, get_args, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from persample import losses
from persample.errors import OptionError, UsageError

Likelihood: TypeAlias = Literal["categorical", "bernoulli"]


@dataclass(frozen=True, eq=False)
class ClassPrediction:
    """Class predictions from K draws of the weights, detached, in at least float32.

    With p_k the probabilities under draw k and H the entropy in nats (Depeweg et al., 2018):

    Attributes:
        probabilities: p̄ = Σ_k p_k / K. Categorical: of shape `(B, C, …)`, with sum 1 over dim 1. Bernoulli: of class
            1, in the shape of the outputs.
        entropy: H(p̄), the whole uncertainty, shape `(B, …)`; for Bernoulli that of each entry.
        mutual_information: H(p̄) − Σ_k H(p_k) / K between target and weights, of the same shape: the part of the
            uncertainty that more training data would remove (epistemic). The rest is in the data (aleatoric).
    """

    probabilities: Tensor
    entropy: Tensor
    mutual_information: Tensor


@dataclass(frozen=True, eq=False)
class GaussianPrediction:
    """Predictions of real numbers or counts from K draws; each tensor has the shape of the targets, `(B, …)`.

    Attributes:
        mean: f̄ = Σ_k f_k / K, with f_k the mean of the targets under draw k.
        epistemic_variance: Σ_k (f_k − f̄)² / (K − 1), which more training data would reduce.
        aleatoric_variance: that of the observations' noise, which stays; averaged over the draws where they differ.
    """

    mean: Tensor
    epistemic_variance: Tensor
    aleatoric_variance: Tensor

    @property
    def variance(self) -> Tensor:
        """Variance of a new observation: epistemic plus aleatoric."""
        return self.epistemic_variance + self.aleatoric_variance


class Summary(Protocol):
    """Accumulates the outputs of draws into a prediction."""

    def add(self, outputs: Tensor) -> None:
        """Add the outputs of some draws, shape `(k, B, …)`."""

    def result(self) -> Any:
        """Return the prediction."""


@runtime_checkable
class Summarised(Protocol):
    """A likelihood as an object, see `persample.likelihoods`."""

    def summary(self) -> Summary:
        """Return an accumulator of the outputs of draws into a prediction."""


def likelihood_of(loss_fn: Any) -> Likelihood | Summarised:
    """Return the likelihood that a loss is or stands for; "categorical" if the loss does not show it.

    Raises:
        UsageError: it speaks of real numbers, or of probabilities instead of logits.
    """
    while isinstance(loss_fn, functools.partial):
        loss_fn = loss_fn.func
    if loss_fn in _REAL_NUMBERS or isinstance(loss_fn, _LOSSES_OF_REAL_NUMBERS):
        raise UsageError(
            "The loss is for real numbers, but does not tell their noise: use predict_gaussian(), pass "
            "likelihood=persample.likelihoods.Gaussian(noise_precision), or train with a likelihood of "
            'persample.likelihoods; for classes pass likelihood="categorical" or "bernoulli".'
        )
    if loss_fn is F.binary_cross_entropy or isinstance(loss_fn, nn.BCELoss):
        raise UsageError(
            "predict() needs logits, but the loss takes probabilities: let the model return logits, and use "
            "persample.losses.bernoulli; or average what you need over several `with optimizer.sampled_params():` "
            "blocks."
        )
    if isinstance(loss_fn, Summarised):
        return loss_fn
    bernoulli = loss_fn in (losses.bernoulli, F.binary_cross_entropy_with_logits)
    return "bernoulli" if bernoulli or isinstance(loss_fn, nn.BCEWithLogitsLoss) else "categorical"


def telling(loss_fn: Any) -> Any:
    """Return the loss, or None if it does not show its likelihood, so that a posterior can do without it."""
    try:
        return None if likelihood_of(loss_fn) == "categorical" else loss_fn
    except UsageError:
        return loss_fn


#: The likelihoods that a file can hold, by name: classes of `persample.likelihoods`, which fills it.
LIKELIHOODS: dict[str, Callable[..., Any]] = {}

_REAL_NUMBERS = (losses.gaussian, F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss)
_LOSSES_OF_REAL_NUMBERS = (nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss)


def summary_of(likelihood: Likelihood | Summarised) -> Summary:
    """Return an accumulator of the outputs of draws into a prediction.

    Raises:
        OptionError: the likelihood is a class, or unknown.
    """
    if isinstance(likelihood, type):
        raise OptionError(f"likelihood={likelihood.__name__} is a class: pass an instance, {likelihood.__name__}().")
    return likelihood.summary() if isinstance(likelihood, Summarised) else ClassSummary(likelihood)


class ClassSummary:
    """Accumulates a `ClassPrediction`, chunk by chunk of draws."""

    def __init__(self, likelihood: Likelihood, *, classes_last: bool = False) -> None:
        if likelihood not in get_args(Likelihood):
            raise OptionError(
                f'likelihood={likelihood!r} must be "categorical" or "bernoulli"; for real numbers there is '
                "predict_gaussian()."
            )
        self._categorical = likelihood == "categorical"
        self._classes_last = classes_last
        self._draws = 0
        self._probabilities = torch.zeros(
            (), device="cpu"
        )  # without dimensions it adds to tensors of every shape and device
        self._entropies = torch.zeros((), device="cpu")

    def add(self, logits: Tensor) -> None:
        """Add the outputs of some draws, shape `(k, B, …)`."""
        if self._classes_last and logits.dim() > 3:
            logits = logits.movedim(-1, 2)
        if self._categorical and logits.dim() < 3:
            raise UsageError(
                f"Class probabilities need logits of shape (B, C, …), but the model returned {tuple(logits.shape[1:])}:"
                ' use likelihood="bernoulli" for logits of class 1 alone, predict_gaussian() for real numbers, or '
                "average what you need over several `with optimizer.sampled_params():` blocks."
            )
        if self._categorical and logits.shape[2] == 1:
            raise UsageError(
                f"The model returned shape {tuple(logits.shape[1:])}, logits of one class, whose softmax is always 1: "
                'use likelihood="bernoulli" for logits of class 1 alone, or predict_gaussian() for real numbers.'
            )
        probabilities = logits.softmax(2) if self._categorical else logits.sigmoid()
        self._draws += len(logits)
        self._probabilities = self._probabilities + probabilities.sum(0)
        self._entropies = self._entropies + self._entropy(probabilities, classes=2).sum(0)

    def result(self) -> ClassPrediction:
        """The prediction from all draws."""
        probabilities = self._probabilities / self._draws
        entropy = self._entropy(probabilities, classes=1)
        # Entropy is concave, so the difference is at least 0; below lies only rounding.
        information = (entropy - self._entropies / self._draws).clamp(min=0)
        return ClassPrediction(probabilities, entropy, information)

    def _entropy(self, probabilities: Tensor, *, classes: int) -> Tensor:
        """Σ −p log p over the classes, in that dimension."""
        terms: Tensor = torch.special.entr(probabilities)
        return terms.sum(classes) if self._categorical else terms + torch.special.entr(1 - probabilities)


class GaussianSummary:
    """Accumulates a `GaussianPrediction`, chunk by chunk of draws."""

    def __init__(self, noise_precision: float) -> None:
        if not 0 < noise_precision < math.inf:
            raise OptionError(f"noise_precision={noise_precision!r} must be a finite number > 0.")
        self._noise_precision = noise_precision
        self._draws = 0
        self._mean = torch.zeros((), device="cpu")
        self._squares = torch.zeros((), device="cpu")  # Σ (f_k − f̄)² so far

    def add(self, outputs: Tensor) -> None:
        """Add the outputs of some draws, shape `(k, B, …)` (Chan, Golub and LeVeque, 1983, for the squares)."""
        old, new = self._draws, len(outputs)
        mean = outputs.mean(0)
        distance = mean - self._mean
        self._draws = old + new
        self._mean = self._mean + distance * (new / self._draws)
        squares = (outputs - mean).square().sum(0)
        self._squares = self._squares + squares + distance.square() * (old * new / self._draws)

    def result(self) -> GaussianPrediction:
        """The prediction from all draws."""
        if self._draws < 2:
            raise OptionError("samples=1 gives no variance over draws: use at least 2, better 32.")
        return GaussianPrediction(
            mean=self._mean,
            epistemic_variance=self._squares / (self._draws - 1),
            aleatoric_variance=torch.full_like(self._mean, 1 / self._noise_precision),
        )


@dataclass(frozen=True)
class KnownNoise:
    """The likelihood of `predict_gaussian`: outputs are means, 1/variance of the noise is known."""

    noise_precision: float

    def summary(self) -> Summary:
        """Return an accumulator of the outputs of draws into a prediction."""
        return GaussianSummary(self.noise_precision)


class NumberSummary:
    """As `GaussianSummary`, for outputs that give mean and variance of the targets.

    Args:
        mean_and_variance: takes outputs `(k, B, …)`, and returns both, each in the shape of k times the targets.
    """

    def __init__(self, mean_and_variance: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
        self._mean_and_variance = mean_and_variance
        self._of_mean = GaussianSummary(1.0)
        self._variance = torch.zeros((), device="cpu")
        self._draws = 0

    def add(self, outputs: Tensor) -> None:
        """Add the outputs of some draws, shape `(k, B, …)`."""
        mean, variance = self._mean_and_variance(outputs)
        self._of_mean.add(mean)
        self._variance = self._variance + variance.sum(0)
        self._draws += len(outputs)

    def result(self) -> GaussianPrediction:
        """The prediction from all draws."""
        return replace(self._of_mean.result(), aleatoric_variance=self._variance / self._draws)
