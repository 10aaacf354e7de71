"""What every optimizer with a posterior offers: predictions and the evidence lower bound."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Unpack

import torch
from torch import Tensor

from persample.vogn.elbo import Elbo
from persample.vogn.loss import require_loss
from persample.vogn.monte_carlo import DrawOptions
from persample.vogn.posterior import Posterior
from persample.vogn.prediction import ClassPrediction, GaussianPrediction, Likelihood, likelihood_of
from persample.vogn.prior import Prior


class WithPosterior:
    """Base of the optimizers that keep a Gaussian posterior over the weights of a model."""

    loss_fn: Callable[[Any, Any], Tensor] | None
    data_size: int
    generator: torch.Generator | None

    @property
    @abstractmethod
    def posterior(self) -> Posterior:
        """The posterior as it is now, with tensors of its own and the optimizer's model.

        Raises:
            UsageError: inside `sampled_params()`, where the model holds a draw.
        """

    @property
    @abstractmethod
    def prior(self) -> Prior:
        """The prior over the trained parameters."""

    @abstractmethod
    def _lend_params(self, call: str) -> AbstractContextManager[None]:
        """Refuse what would find draws instead of the mean, for as long as `call` writes draws into the model."""

    def predict(
        self, inputs: Any, *, likelihood: Likelihood | None = None, **draws: Unpack[DrawOptions]
    ) -> ClassPrediction:
        """Predict classes by the average over draws of the weights; see `Posterior.predict`.

        Args:
            inputs: what the model takes.
            likelihood: what the model returns. None goes by the loss: "bernoulli" if it is `persample.losses.bernoulli`
                or PyTorch's of the same kind, else "categorical".
            draws: samples, generator, draws_at_once, rows_at_once and pick, see `DrawOptions`.

        Raises:
            UsageError: no likelihood is given, and the loss is one of real numbers, or of probabilities.
            PersampleError: as `Posterior.predict`.
        """
        likelihood = likelihood or likelihood_of(self.loss_fn)
        posterior = self.posterior
        with self._lend_params("predict()"):
            return posterior.predict(inputs, likelihood=likelihood, **self._with_generator(draws))

    def predict_gaussian(
        self, inputs: Any, *, noise_precision: float = 1.0, **draws: Unpack[DrawOptions]
    ) -> GaussianPrediction:
        """Predict real numbers with a known noise; see `Posterior.predict_gaussian`."""
        posterior = self.posterior
        with self._lend_params("predict_gaussian()"):
            return posterior.predict_gaussian(inputs, noise_precision=noise_precision, **self._with_generator(draws))

    def elbo(self, inputs: Any, targets: Any, **draws: Unpack[DrawOptions]) -> Elbo:
        """Estimate the evidence lower bound with the optimizer's loss, prior and N; see `Posterior.elbo`.

        Args:
            inputs: all training data, or a part of them that stands for all.
            targets: what the loss function takes.
            draws: samples, generator, draws_at_once, rows_at_once and pick, see `DrawOptions`.
        """
        loss_fn = require_loss(self.loss_fn, "elbo()")
        posterior, prior = self.posterior, self.prior
        with self._lend_params("elbo()"):
            return posterior.elbo(
                loss_fn, inputs, targets, prior=prior, data_size=self.data_size, **self._with_generator(draws)
            )

    def _with_generator(self, draws: DrawOptions) -> DrawOptions:
        """The same options, with the optimizer's generator where none is given."""
        return {**draws, "generator": draws.get("generator") or self.generator}
