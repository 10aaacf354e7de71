"""The Gaussian posterior over the weights as a value, independent of the optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, Unpack, overload

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from persample.errors import OptionError, UsageError
from persample.loaders import batches_of, inputs_of
from persample.sources.batch import arguments, split_batch
from persample.vogn import core
from persample.vogn.elbo import Elbo, LikelihoodTable
from persample.vogn.monte_carlo import DrawOptions, for_each_draw
from persample.vogn.over_loader import at_the_same_draws, joined
from persample.vogn.prediction import (
    ClassPrediction,
    GaussianPrediction,
    KnownNoise,
    Likelihood,
    Summarised,
    likelihood_of,
    summary_of,
)
from persample.vogn.prior import Prior, require_same_shapes
from persample.vogn.sampling import draw
from persample.vogn.saving import posterior_file
from persample.vogn.settings import require_count, require_generator


@dataclass(frozen=True, eq=False)
class Posterior:
    """A Gaussian N(μ, 1/precision) over each weight, independent of the others.

    `optimizer.posterior` returns one with tensors of its own: it stays as it is while the training goes on.

    Attributes:
        mean: μ of each parameter, keyed by its name in `model.named_parameters()`, in at least float32.
        precision: 1/σ² of each weight, with the same keys and shapes; infinite where the weight was pruned.
        model: the network that `predict` and the like use; None after loading without one.
        loss_fn: the loss that it was trained with, by which `predict` knows what the model returns; None if the loss
            does not show that.

    Raises:
        OptionError: the keys or shapes differ.
    """

    mean: Mapping[str, Tensor]
    precision: Mapping[str, Tensor]
    model: nn.Module | None = field(default=None, repr=False)
    loss_fn: Callable[[Any, Any], Any] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        require_same_shapes(self.mean, self.precision)

    @property
    def scale(self) -> dict[str, Tensor]:
        """σ = 1 / sqrt(precision) of each weight."""
        names, precision = zip(*self.precision.items(), strict=True)
        return dict(zip(names, core.precision_to_scale(precision), strict=True))

    @property
    def variance(self) -> dict[str, Tensor]:
        """σ² = 1 / precision of each weight."""
        return {name: value.reciprocal() for name, value in self.precision.items()}

    def sample(self, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Draw all weights once: μ + σ ∘ ε, ε ~ N(0, I).

        Args:
            generator: source of the noise; None is PyTorch's global generator.

        Raises:
            OptionError: `generator` is none.
        """
        require_generator("generator", generator)
        names, mean = zip(*self.mean.items(), strict=True)
        scale = self.scale
        return dict(zip(names, draw(mean, [scale[name] for name in names], generator), strict=True))

    def log_prob(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Logarithm of the density at `weights`, Σ −½ (precision (w − μ)² − log(precision / 2π)).

        Args:
            weights: a value for each parameter, keyed and shaped as `mean`.

        Returns:
            A scalar in float64 on the CPU, differentiable in `weights`.

        Raises:
            OptionError: `weights` has other keys or shapes.
            UsageError: the posterior was pruned: it has no density.
        """
        self._refuse_pruned("a density")
        require_same_shapes(self.mean, weights)
        return _total(
            -0.5 * (self.precision[name] * (weights[name] - mean).square() - (self.precision[name] / math.tau).log())
            for name, mean in self.mean.items()
        )

    def entropy(self) -> Tensor:
        """Differential entropy Σ ½ log(2πe / precision) in nats, a scalar in float64 on the CPU.

        Raises:
            UsageError: the posterior was pruned: it has no density.
        """
        self._refuse_pruned("an entropy")
        return _total(-0.5 * (value / (math.tau * math.e)).log() for value in self.precision.values())

    def kl(self, prior: Prior | Posterior | float) -> Tensor:
        """Kullback-Leibler divergence KL(self ‖ prior) in nats.

        With mean m and precision λ of the prior, Σ ½ (λ/precision + λ (μ − m)² − 1 − log(λ/precision)).

        Args:
            prior: a prior or a posterior over the same parameters, or λ > 0 of N(0, 1/λ).

        Returns:
            A scalar in float64 on the CPU.

        Raises:
            OptionError: `prior` is flat somewhere (λ = 0), so that the divergence is infinite, or it belongs to other
                parameters.
            UsageError: one of the two was pruned.
        """
        self._refuse_pruned("a divergence")
        if isinstance(prior, Posterior):
            prior._refuse_pruned("a divergence")
        elif not isinstance(prior, Prior):
            prior = Prior.isotropic(prior, self.mean)
        require_same_shapes(self.mean, prior.mean)
        if not all(bool((value > 0).all()) for value in prior.precision.values()):
            raise OptionError("The divergence from a flat prior (precision 0) is infinite: give it a precision > 0.")
        terms = []
        for name, mean in self.mean.items():
            ratio = prior.precision[name] / self.precision[name]
            distance = prior.precision[name] * (mean - prior.mean[name]).square()
            terms.append(0.5 * (ratio + distance - 1 - ratio.log()))
        return _total(terms)

    def as_prior(self) -> Prior:
        """Return this posterior as the prior for further training: yesterday's posterior is today's prior.

        Raises:
            UsageError: the posterior was pruned: no data could move the pruned weights again.
        """
        self._refuse_pruned("a use as prior")
        return Prior(self.mean, self.precision)

    def signal_to_noise(self) -> dict[str, Tensor]:
        """Return abs(μ) / σ of each weight (Graves, 2011; Blundell et al., 2015, section 5.1); 0 where pruned."""
        return {name: (self.mean[name].abs() / scale).nan_to_num(0.0) for name, scale in self.scale.items()}

    def prune(self, fraction: float) -> Posterior:
        """Return a posterior in which the weights with the lowest signal-to-noise ratio are exactly 0.

        Their mean is 0 and their precision infinite, so that every draw has them at 0. Source: Graves, 2011; Blundell
        et al., 2015, section 5.1.

        Args:
            fraction: the share of all weights to remove, from 0 to 1, to the nearest whole number of weights. Those
                that were removed before count among them. Equal ratios go by the order of the parameters.

        Raises:
            OptionError: `fraction` is not from 0 to 1.
        """
        if not 0 <= fraction <= 1:
            raise OptionError(f"fraction={fraction!r} must be a number from 0 to 1.")
        ratios = torch.cat([value.flatten().cpu() for value in self.signal_to_noise().values()])
        removed = torch.zeros(ratios.shape, dtype=torch.bool)
        removed[ratios.argsort(stable=True)[: round(fraction * len(ratios))]] = True
        parts = removed.split([value.numel() for value in self.mean.values()])
        masks = {
            name: part.view(value.shape).to(value.device)
            for (name, value), part in zip(self.mean.items(), parts, strict=True)
        }
        return Posterior(
            mean={name: value.masked_fill(masks[name], 0.0) for name, value in self.mean.items()},
            precision={name: value.masked_fill(masks[name], math.inf) for name, value in self.precision.items()},
            model=self.model,
            loss_fn=self.loss_fn,
        )

    @overload
    def predict(
        self,
        inputs: Any,
        *,
        likelihood: Likelihood,
        progress: bool = False,
        **draws: Unpack[DrawOptions],
    ) -> ClassPrediction: ...

    @overload
    def predict(
        self,
        inputs: Any,
        *,
        likelihood: Summarised | None = None,
        progress: bool = False,
        **draws: Unpack[DrawOptions],
    ) -> Any: ...

    def predict(
        self,
        inputs: Any,
        *,
        likelihood: Likelihood | Summarised | None = None,
        progress: bool = False,
        **draws: Unpack[DrawOptions],
    ) -> Any:
        """Predict by averaging over draws of the weights: Σ_k p(y | x, w_k) / K.

        Returns a `ClassPrediction`; a `GaussianPrediction` if the likelihood, or the loss, is one of real numbers or
        counts of `persample.likelihoods`.

        The model stays in the mode it is in: call `model.eval()` before, to predict without dropout.

        Args:
            inputs: what the model takes: a tensor, a tuple of positional arguments, or a dict of keyword arguments; or
                a DataLoader, whose batches all meet the same draws: pairs or dicts with targets, which are left out,
                or inputs alone.
            likelihood: what the model returns. "categorical": logits of shape `(B, C, …)`, of which the softmax over
                dim 1 is taken; "bernoulli": logits of any shape, of which the sigmoid is; or one of
                `persample.likelihoods`, whose prediction is returned. None goes by `loss_fn`: "bernoulli" if it is
                `persample.losses.bernoulli` or PyTorch's of the same kind, a likelihood if it is one, else
                "categorical".
            progress: whether to show a bar over a DataLoader, by tqdm.
            draws: samples, generator, draws_at_once, rows_at_once and pick, see `DrawOptions`.

        Raises:
            OptionError: a number is below 1, `likelihood` is unknown, or the posterior is not one of the model.
            UsageError: the posterior has no model; the model's outputs are not logits of that shape; or no likelihood
                is given, and the loss is one of real numbers, or of probabilities.
            BatchError: `inputs` is neither a tensor, nor a tuple, nor a dict.
        """
        likelihood = likelihood or likelihood_of(self.loss_fn)
        if isinstance(inputs, DataLoader):
            batches = inputs_of(inputs, progress=progress)
            return joined(self._over(batches, draws, lambda part: self.predict(part, likelihood=likelihood, **draws)))
        summary = summary_of(likelihood)
        for_each_draw(self._model("predict()"), self, inputs, summary.add, **draws)
        return summary.result()

    def predict_gaussian(
        self, inputs: Any, *, noise_precision: float = 1.0, progress: bool = False, **draws: Unpack[DrawOptions]
    ) -> GaussianPrediction:
        """Predict real numbers, for models whose outputs are means of Gaussians with a known noise.

        Args:
            inputs: as for `predict`.
            noise_precision: β = 1/variance of the observations' noise, as in `persample.losses.gaussian`.
            progress: whether to show a bar over a DataLoader, by tqdm.
            draws: samples (at least 2), generator, draws_at_once, rows_at_once and pick, see `DrawOptions`.

        Raises:
            OptionError: `samples` is below 2, `noise_precision` is not above 0, or as `predict`.
            UsageError: the posterior has no model, or the model returns something else than real numbers.
            BatchError: `inputs` is neither a tensor, nor a tuple, nor a dict.
        """
        self._model("predict_gaussian()")
        predicted: GaussianPrediction = self.predict(
            inputs, likelihood=KnownNoise(noise_precision), progress=progress, **draws
        )
        return predicted

    def log_likelihoods(
        self,
        loss_fn: Callable[[Any, Any], Tensor],
        inputs: Any,
        targets: Any = None,
        *,
        progress: bool = False,
        **draws: Unpack[DrawOptions],
    ) -> Tensor:
        """Return log p(target_i | input_i, w_k) for each draw k and sample i, in nats, shape `(K, B)`.

        Args:
            loss_fn: minus the log-likelihood of each sample, shape `(B,)`.
            inputs: as for `predict`; or a DataLoader of pairs, or of dicts with an entry "labels" or "targets".
            targets: what `loss_fn` takes; with a DataLoader, None.
            progress: whether to show a bar over a DataLoader, by tqdm.
            draws: samples, generator, draws_at_once, rows_at_once and pick, see `DrawOptions`.

        Raises:
            BatchError: inputs and targets have different lengths.
            LossError: the loss is not a finite vector with one entry per sample.
            PersampleError: as `predict`.
        """
        model = self._model("log_likelihoods()")
        if isinstance(inputs, DataLoader):
            if targets is not None:
                raise UsageError("A DataLoader provides its own targets: omit the argument.")
            pairs = batches_of(inputs, progress=progress)
            return torch.cat(list(self._over(pairs, draws, lambda p: self.log_likelihoods(loss_fn, *p, **draws))), 1)
        batch = split_batch(*arguments(inputs, model), targets, for_gradients=False)
        table = LikelihoodTable(loss_fn, batch.targets)
        for_each_draw(model, self, inputs, table.add, **draws)
        return table.result()

    def elbo(
        self,
        loss_fn: Callable[[Any, Any], Tensor],
        inputs: Any,
        targets: Any = None,
        *,
        prior: Prior | Posterior | float,
        data_size: int | None = None,
        progress: bool = False,
        **draws: Unpack[DrawOptions],
    ) -> Elbo:
        """Estimate the evidence lower bound E[log p(D | w)] − KL(posterior ‖ prior), in nats.

        Args:
            loss_fn: minus the log-likelihood of each sample, shape `(B,)`.
            inputs: all training data, or a part of them that stands for all; as for `log_likelihoods`.
            targets: what `loss_fn` takes; with a DataLoader, None.
            prior: as for `kl`.
            data_size: N, the number of training samples, to which the log-likelihood is scaled; None is B.
            progress: whether to show a bar over a DataLoader, by tqdm.
            draws: samples, generator, draws_at_once, rows_at_once and pick, see `DrawOptions`.

        Raises:
            PersampleError: as `log_likelihoods` and `kl`.
        """
        table = self.log_likelihoods(loss_fn, inputs, targets, progress=progress, **draws)
        size = table.shape[1] if data_size is None else require_count("data_size", data_size)
        return Elbo(table.double().mean(1) * size, self.kl(prior).item(), size)

    def save(self, path: str | PathLike[str]) -> None:
        """Write mean, precision and likelihood to a safetensors file, whole or not at all; the model is not saved.

        Of the loss the likelihood is saved, if it is of `persample.likelihoods` or one of classes, else its name.

        Args:
            path: the file; its folder exists. Of a symbolic link the target is written.

        Raises:
            MissingPackageError: the package safetensors is not installed.
            DataError: the file cannot be written, or what is there is a folder, a pipe or a device.
        """
        posterior_file.write(Path(path), self.mean, self.precision, self.loss_fn)

    @staticmethod
    def load(
        path: str | PathLike[str],
        model: nn.Module | None = None,
        *,
        loss_fn: Callable[[Any, Any], Any] | None = None,
        device: torch.device | str | None = None,
    ) -> Posterior:
        """Read what `save` wrote.

        Args:
            path: the file.
            model: the network that `predict` and the like shall use; it is not changed.
            loss_fn: the loss that the posterior was trained with; None is one of the likelihood that was saved.
            device: where to put the tensors; if None, where the model has its parameters, or on the CPU.

        Raises:
            MissingPackageError: the package safetensors is not installed.
            OptionError: there is no such device here.
            DataError: the file is missing, damaged, or not a posterior.
        """
        mean, precision, saved_loss = posterior_file.read(Path(path), "cpu" if device is None else device)
        if device is None and model is not None:
            places = {name: p.device for name, p in model.named_parameters()}
            mean, precision = (
                {name: value.to(places.get(name, value.device)) for name, value in table.items()}
                for table in (mean, precision)
            )
        return Posterior(mean, precision, model, loss_fn or saved_loss)

    def _over(self, batches: Iterable[Any], draws: DrawOptions, ask: Callable[[Any], Any]) -> Iterator[Any]:
        """Yield `ask` of each batch, all at the same draws."""
        return at_the_same_draws(batches, draws.get("generator"), self._devices(), ask)

    def _devices(self) -> set[torch.device]:
        return {mean.device for mean in self.mean.values()}

    def _model(self, call: str) -> nn.Module:
        if self.model is None:
            raise UsageError(
                f"{call} needs a model, but this posterior has none: load it with Posterior.load(path, model), or set "
                "one by dataclasses.replace(posterior, model=model)."
            )
        return self.model

    def _refuse_pruned(self, what: str) -> None:
        if any(bool(value.isinf().any()) for value in self.precision.values()):
            raise UsageError(
                f"This posterior was pruned, so some weights are exactly 0, and such a distribution has no {what}. "
                "Use the posterior before prune()."
            )


def _total(terms: Iterable[Tensor]) -> Tensor:
    """The sum over all entries of all tensors, in float64."""
    return torch.stack([term.sum().cpu().double() for term in terms]).sum()
