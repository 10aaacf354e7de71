"""Ensembles: a mixture of several runs' posteriors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from persample.errors import OptionError
from persample.loaders import batches_of, inputs_of
from persample.vogn.monte_carlo import DrawOptions, for_each_draw
from persample.vogn.over_loader import at_the_same_draws, joined
from persample.vogn.posterior import Posterior
from persample.vogn.prediction import Likelihood, Summarised, summary_of


class Ensemble:
    """The mixture Σ_m q_m / M of posteriors over the weights of networks, one per run.

    Predictions average over the draws of all members, as those of one posterior: what the members disagree about is
    epistemic. Source: Lakshminarayanan et al., "Simple and Scalable Predictive Uncertainty Estimation using Deep
    Ensembles", NeurIPS 2017, with a posterior in place of each network; Wilson and Izmailov, "Bayesian Deep Learning
    and a Probabilistic Perspective of Generalization", NeurIPS 2020.

    Args:
        members: posteriors with models.

    Raises:
        OptionError: there is none, or one has no model.
    """

    def __init__(self, members: Iterable[Posterior]) -> None:
        self.members = list(members)
        if not self.members:
            raise OptionError("An ensemble needs at least one posterior.")
        for index, member in enumerate(self.members):
            if not isinstance(member, Posterior) or member.model is None:
                what = "no model" if isinstance(member, Posterior) else f"the type {type(member).__name__}"
                raise OptionError(f"Member {index} of the ensemble has {what}: give it posteriors with models.")

    @staticmethod
    def of_models(models: Iterable[nn.Module]) -> Ensemble:
        """Return the ensemble of networks trained without a posterior; each counts as a single draw.

        Raises:
            OptionError: there is none.
        """
        members = []
        for model in models:
            mean = {name: p.detach().clone() for name, p in model.named_parameters()}
            sure = {name: torch.full_like(value, math.inf) for name, value in mean.items()}
            members.append(Posterior(mean, sure, model))
        return Ensemble(members)

    def predict(
        self,
        inputs: Any,
        *,
        likelihood: Likelihood | Summarised = "categorical",
        progress: bool = False,
        **draws: Unpack[DrawOptions],
    ) -> Any:
        """Predict by the average over draws of all members; see `Posterior.predict`.

        Args:
            inputs: what the models take, or a DataLoader.
            likelihood: what they return.
            progress: whether to show a bar over a DataLoader, by tqdm.
            draws: samples of each member, generator, draws_at_once, rows_at_once and pick, see `DrawOptions`.

        Raises:
            PersampleError: as `Posterior.predict`.
        """
        if isinstance(inputs, DataLoader):
            batches = inputs_of(inputs, progress=progress)
            return joined(self._over(batches, draws, lambda part: self.predict(part, likelihood=likelihood, **draws)))
        summary = summary_of(likelihood)
        for member in self.members:
            assert member.model is not None
            for_each_draw(member.model, member, inputs, summary.add, **draws)
        return summary.result()

    def log_likelihoods(
        self,
        loss_fn: Callable[[Any, Any], Tensor],
        inputs: Any,
        targets: Any = None,
        *,
        progress: bool = False,
        **draws: Unpack[DrawOptions],
    ) -> Tensor:
        """Return log p(target_i | input_i, w_k) for each draw k of all members and each sample i, shape `(M K, B)`.

        Arguments and errors are those of `Posterior.log_likelihoods`.
        """
        if isinstance(inputs, DataLoader):
            pairs = batches_of(inputs, progress=progress)
            return torch.cat(list(self._over(pairs, draws, lambda p: self.log_likelihoods(loss_fn, *p, **draws))), 1)
        return torch.cat([m.log_likelihoods(loss_fn, inputs, targets, **draws) for m in self.members])

    def _over(self, batches: Iterable[Any], draws: DrawOptions, ask: Callable[[Any], Any]) -> Iterable[Any]:
        devices = {mean.device for member in self.members for mean in member.mean.values()}
        return at_the_same_draws(batches, draws.get("generator"), devices, ask)
