"""Distributions of the targets given the model's outputs: one object for loss, prediction and bound.

A likelihood is called as a loss, `likelihood(outputs, targets)`, and returns −log p(target | output) of each sample,
shape `(B,)`. An optimizer that was made with it predicts with it. Posteriors take it as `likelihood=`, and
`persample.fisher` draws targets from it.

    likelihood = persample.likelihoods.HeteroscedasticGaussian()
    optimizer = persample.VOGN(model, likelihood, data_size=N)
    …
    predicted = optimizer.predict(inputs)       # mean, epistemic_variance, aleatoric_variance
    bound = optimizer.elbo(inputs, targets)
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from persample import losses
from persample.errors import LossError, OptionError
from persample.vogn.prediction import LIKELIHOODS, ClassSummary, NumberSummary, Summary


class TargetDistribution(ABC):
    """Base of the likelihoods."""

    def __call__(self, outputs: Any, targets: Any) -> Tensor:
        """Return −log p(target | output) of each sample in nats, shape `(B,)`.

        The outputs are a tensor, or an object whose `logits` are.
        """
        return self.losses(getattr(outputs, "logits", outputs), targets)

    @abstractmethod
    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return what a call returns, for a tensor."""

    @abstractmethod
    def summary(self) -> Summary:
        """Return an accumulator of the outputs of draws into a prediction."""

    @abstractmethod
    def draw(self, outputs: Tensor, generator: torch.Generator | None) -> Tensor:
        """Draw a target for each sample."""

    @abstractmethod
    def roots(self, outputs: Tensor) -> Iterator[Tensor]:
        """Yield vectors v_c with Σ_c v_c v_cᵀ the Fisher information of the outputs of each sample."""

    def left_out(self, outputs: Tensor, targets: Any) -> Tensor | None:
        """Return where the loss leaves these targets of the data out: True in a tensor that expands to the outputs.

        None if it leaves out none.

        Raises:
            LossError: the targets do not belong to the outputs.
        """
        return None

    def draw_for(self, outputs: Tensor, targets: Any, generator: torch.Generator | None) -> Tensor:
        """Draw a target for each sample, but keep those of the data that the loss leaves out."""
        left_out, drawn = self.left_out(outputs, targets), self.draw(outputs, generator)
        return drawn if left_out is None else torch.where(left_out.view_as(drawn), targets, drawn)

    def roots_for(self, outputs: Tensor, targets: Any) -> Iterator[Tensor]:
        """Yield what `roots` does, with zeros where the loss leaves targets of the data out."""
        left_out = self.left_out(outputs, targets)
        for vectors in self.roots(outputs):
            yield vectors if left_out is None else vectors.masked_fill(left_out, 0.0)


@dataclass(frozen=True)
class Categorical(TargetDistribution):
    """Classes; outputs are logits `(B, C, …)`, targets class indices `(B, …)`; as `persample.losses.cross_entropy`.

    Attributes:
        classes_last: whether the logits are `(B, …, C)`, as language models return them.
        ignore_index: the target of positions that do not count.
    """

    classes_last: bool = False
    ignore_index: int = -100

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self._refuse_other_positions(outputs, targets)
        if targets.is_floating_point():  # probabilities of the classes
            return losses.cross_entropy(self._classes_second(outputs), self._classes_second(targets))
        logits = self._classes_second(outputs)
        entries = F.cross_entropy(logits, targets, ignore_index=self.ignore_index, reduction="none")
        return losses.sum_per_sample(entries)

    def summary(self) -> Summary:
        return ClassSummary("categorical", classes_last=self.classes_last)

    def draw(self, outputs: Tensor, generator: torch.Generator | None) -> Tensor:
        probabilities = self._classes_second(outputs).movedim(1, -1).softmax(-1)
        rows = probabilities.reshape(-1, probabilities.shape[-1])
        return torch.multinomial(rows, 1, generator=generator).view(probabilities.shape[:-1])

    def roots(self, outputs: Tensor) -> Iterator[Tensor]:
        """Yield sqrt(p_c) (p − e_c) of each position, as diag(p) − p pᵀ = Σ_c p_c (p − e_c)(p − e_c)ᵀ.

        Given the outputs, the targets of positions are independent: the information of a sample is the sum of theirs.
        """
        p = self._classes_second(outputs).softmax(1)
        of_positions = p.reshape(*p.shape[:2], -1)
        for position in range(of_positions.shape[2]):
            for c in range(of_positions.shape[1]):
                v = torch.zeros_like(of_positions)
                v[:, :, position] = of_positions[:, :, position]
                v[:, c, position] -= 1
                v = (of_positions[:, c : c + 1].sqrt() * v).view(p.shape)
                yield v.movedim(1, -1) if self.classes_last else v

    def left_out(self, outputs: Tensor, targets: Any) -> Tensor | None:
        self._refuse_other_positions(outputs, targets)
        if not isinstance(targets, Tensor) or targets.is_floating_point():
            return None
        ignored, classes = targets == self.ignore_index, self._classes_second(outputs).shape[1]
        wrong = targets[~ignored & ((targets < 0) | (targets >= classes))]
        if len(wrong):
            raise LossError(
                f"The logits have {classes} classes, but a target is {wrong[0].item()}: class indices go from 0 to "
                f"{classes - 1}; pass ignore_index={wrong[0].item()} if these targets shall not count."
            )
        return ignored.unsqueeze(-1 if self.classes_last else 1) if bool(ignored.any()) else None

    def _classes_second(self, tensor: Tensor) -> Tensor:
        return tensor.movedim(-1, 1) if self.classes_last else tensor

    def _refuse_other_positions(self, outputs: Tensor, targets: Any) -> None:
        """Raise unless there are logits of several classes, and one target for each position.

        Raises:
            LossError: there are not.
        """
        if outputs.dim() < 2 or self._classes_second(outputs).shape[1] < 2:
            raise LossError(
                "Categorical needs logits of shape (B, C, …) with C > 1, but the model returned "
                f"{tuple(outputs.shape)}: use Bernoulli for the logit of one class."
            )
        if not isinstance(targets, Tensor):
            return
        if targets.is_floating_point():
            if targets.shape != outputs.shape:
                raise LossError(
                    f"Targets of dtype {targets.dtype} are probabilities of the classes, in the shape of the logits "
                    f"{tuple(outputs.shape)}, but the data's have {tuple(targets.shape)}: pass class indices by "
                    "targets.long()."
                )
            return
        shape = tuple(self._classes_second(outputs).select(1, 0).shape)
        if tuple(targets.shape) != shape:
            other = "" if self.classes_last else ", or Categorical(classes_last=True) if the classes come last"
            raise LossError(
                f"Logits of shape {tuple(outputs.shape)} have their classes in dim {-1 if self.classes_last else 1}, "
                f"and targets of shape {shape}, but the data's have {tuple(targets.shape)}: pass one class index for "
                f"each position{other}."
            )


@dataclass(frozen=True)
class Bernoulli(TargetDistribution):
    """Independent zeros and ones; outputs are logits in the shape of the targets; as `persample.losses.bernoulli`."""

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return losses.bernoulli(outputs, targets)

    def summary(self) -> Summary:
        return ClassSummary("bernoulli")

    def draw(self, outputs: Tensor, generator: torch.Generator | None) -> Tensor:
        return torch.bernoulli(outputs.sigmoid(), generator=generator)

    def roots(self, outputs: Tensor) -> Iterator[Tensor]:
        p = outputs.sigmoid()
        return _diagonal((p * (1 - p)).sqrt())


@dataclass(frozen=True)
class Gaussian(TargetDistribution):
    """Real numbers with a known noise; outputs are means in the shape of the targets; as `persample.losses.gaussian`.

    Attributes:
        noise_precision: β = 1/variance of the noise, above 0.

    Raises:
        OptionError: it is not above 0.
    """

    noise_precision: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.noise_precision < math.inf:
            raise OptionError(f"noise_precision={self.noise_precision!r} must be a finite number > 0.")

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return losses.gaussian(outputs, targets, noise_precision=self.noise_precision)

    def summary(self) -> Summary:
        return NumberSummary(lambda outputs: (outputs, torch.full_like(outputs, 1 / self.noise_precision)))

    def draw(self, outputs: Tensor, generator: torch.Generator | None) -> Tensor:
        return outputs + _noise(outputs, generator) / math.sqrt(self.noise_precision)

    def roots(self, outputs: Tensor) -> Iterator[Tensor]:
        return _diagonal(torch.full_like(outputs, math.sqrt(self.noise_precision)))


@dataclass(frozen=True)
class HeteroscedasticGaussian(TargetDistribution):
    """Real numbers with noise that the model predicts or learns (`LearnedNoise`).

    Outputs `(B, 2 D, …)` hold in dim 1 the D means f, then the D log-variances v; targets have shape `(B, D, …)`:

        −log p(y | f, v) = Σ ½ ((y − f)² exp(−v) + v + log 2π)

    Source: Nix and Weigend, "Estimating the mean and variance of the target probability distribution", 1994; Kendall
    and Gal, "What Uncertainties Do We Need in Bayesian Deep Learning for Computer Vision?", NeurIPS 2017.
    """

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        mean, log_variance = _halves(outputs, 1)
        _require_same_shape("HeteroscedasticGaussian", "means", mean, targets)
        entries = (targets - mean).square() * (-log_variance).exp() + log_variance + math.log(math.tau)
        return 0.5 * losses.sum_per_sample(entries)

    def summary(self) -> Summary:
        def mean_and_variance(outputs: Tensor) -> tuple[Tensor, Tensor]:
            mean, log_variance = _halves(outputs, 2)
            return mean, log_variance.exp()

        return NumberSummary(mean_and_variance)

    def draw(self, outputs: Tensor, generator: torch.Generator | None) -> Tensor:
        mean, log_variance = _halves(outputs, 1)
        return mean + (0.5 * log_variance).exp() * _noise(mean, generator)

    def roots(self, outputs: Tensor) -> Iterator[Tensor]:
        """Of the mean the information is exp(−v), of the log-variance ½."""
        _, log_variance = _halves(outputs, 1)
        of_mean = (-0.5 * log_variance).exp()
        return _diagonal(torch.cat([of_mean, torch.full_like(of_mean, math.sqrt(0.5))], 1))


@dataclass(frozen=True)
class Poisson(TargetDistribution):
    """Counts; outputs are logarithms of the rates in the shape of the targets.

    −log p(y | f) = Σ exp(f) − y f + log y!
    """

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        _require_same_shape("Poisson", "log-rates", outputs, targets)
        counts = targets.to(outputs.dtype)
        return losses.sum_per_sample(outputs.exp() - counts * outputs + torch.lgamma(counts + 1))

    def summary(self) -> Summary:
        return NumberSummary(lambda outputs: (outputs.exp(), outputs.exp()))

    def draw(self, outputs: Tensor, generator: torch.Generator | None) -> Tensor:
        return torch.poisson(outputs.exp(), generator=generator)

    def roots(self, outputs: Tensor) -> Iterator[Tensor]:
        return _diagonal((0.5 * outputs).exp())


LIKELIHOODS.update(
    {kind.__name__: kind for kind in (Categorical, Bernoulli, Gaussian, HeteroscedasticGaussian, Poisson)}
)


class LearnedNoise(nn.Module):
    """A model of means with learned noise, equal for all inputs: for `HeteroscedasticGaussian`.

    The log-variances are a parameter of this model, so that optimizers train them, and posteriors are over them, too.

    Args:
        model: returns means `(B, D, …)`.
        outputs: D, the size of dim 1.
        log_variance: where they start.
    """

    def __init__(self, model: nn.Module, outputs: int, *, log_variance: float = 0.0) -> None:
        super().__init__()
        self.model = model
        like = next(model.parameters(), torch.zeros(()))
        self.log_variance = nn.Parameter(torch.full((outputs,), log_variance, dtype=like.dtype, device=like.device))

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return means and log-variances, concatenated in dim 1.

        Raises:
            LossError: the means have another shape.
        """
        mean: Tensor = self.model(*args, **kwargs)
        if mean.dim() < 2 or mean.shape[1] != len(self.log_variance):
            raise LossError(
                f"LearnedNoise has {len(self.log_variance)} log-variances, but its model returned means of shape "
                f"{tuple(mean.shape)}: pass outputs=D for means of shape (B, D, …)."
            )
        log_variance = self.log_variance.view(1, -1, *[1] * (mean.dim() - 2))
        return torch.cat([mean, torch.zeros_like(mean) + log_variance], 1)


def _halves(outputs: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    if not isinstance(outputs, Tensor) or outputs.dim() <= dim or outputs.shape[dim] % 2:
        shape = tuple(outputs.shape[dim - 1 :]) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise LossError(
            f"HeteroscedasticGaussian needs outputs of shape (B, 2 D, …), means and then log-variances in dim 1, but "
            f"the model returned {shape}: give it twice as many outputs, or wrap it in LearnedNoise."
        )
    size = outputs.shape[dim] // 2
    return outputs.narrow(dim, 0, size), outputs.narrow(dim, size, size)


def _require_same_shape(name: str, what: str, outputs: Tensor, targets: Any) -> None:
    if not isinstance(targets, Tensor) or outputs.shape != targets.shape:
        shape = tuple(targets.shape) if isinstance(targets, Tensor) else type(targets).__name__
        raise LossError(
            f"{name} got {what} of shape {tuple(outputs.shape)} and targets of shape {shape}: broadcasting them would "
            "pair the wrong entries. Give both the same shape, for example with targets.unsqueeze(1)."
        )


def _noise(like: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(like.shape, generator=generator, device=like.device, dtype=like.dtype)


def _diagonal(roots: Tensor) -> Iterator[Tensor]:
    """The vectors of independent entries, whose information is `roots`²."""
    rows = roots.reshape(len(roots), -1)
    for c in range(rows.shape[1]):
        v = torch.zeros_like(rows)
        v[:, c] = rows[:, c]
        yield v.view(roots.shape)
