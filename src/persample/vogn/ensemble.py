"""Ensembles: a mixture of several runs' posteriors."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from os import PathLike
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from persample.errors import DataError, OptionError, UsageError
from persample.files import replacing
from persample.loaders import batches_of, inputs_of
from persample.vogn.monte_carlo import DrawOptions, for_each_draw
from persample.vogn.over_loader import at_the_same_draws, joined
from persample.vogn.posterior import Posterior
from persample.vogn.prediction import Likelihood, Summarised, likelihood_of, summary_of

_INDEX = "ensemble.json"
_HEADER: dict[str, Any] = {"format": "persample ensemble", "version": "1"}


def _member(index: int) -> str:
    return f"member-{index}.safetensors"


def _members_in(index: Path) -> int:
    """The number of members that an index tells.

    Raises:
        DataError: there is none, or it is damaged.
    """
    try:
        header = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{index} cannot be read ({error}): pass the folder that Ensemble.save wrote.") from error
    count = header.get("members") if isinstance(header, dict) else None
    if type(count) is not int or count < 1 or header != _HEADER | {"members": count}:
        raise DataError(f"{index} is not the index of an ensemble in version {_HEADER['version']}, or is damaged.")
    return count


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
                raise OptionError(
                    f"Member {index} of the ensemble has {what}: give it posteriors with models, such as "
                    "optimizer.posterior, or networks by Ensemble.of_models."
                )

    @staticmethod
    def of_models(models: Iterable[nn.Module], *, loss_fn: Callable[[Any, Any], Any] | None = None) -> Ensemble:
        """Return the ensemble of networks trained without a posterior; each counts as a single draw.

        Args:
            models: the networks.
            loss_fn: the loss that they were trained with, by which `predict` knows what they return.

        Raises:
            OptionError: there is none.
        """
        members = []
        for model in models:
            mean = {name: p.detach().clone() for name, p in model.named_parameters()}
            sure = {name: torch.full_like(value, math.inf) for name, value in mean.items()}
            members.append(Posterior(mean, sure, model, loss_fn))
        return Ensemble(members)

    def predict(
        self,
        inputs: Any,
        *,
        likelihood: Likelihood | Summarised | None = None,
        progress: bool = False,
        **draws: Unpack[DrawOptions],
    ) -> Any:
        """Predict by the average over draws of all members; see `Posterior.predict`.

        Args:
            inputs: what the models take, or a DataLoader.
            likelihood: what they return; None goes by the losses of the members.
            progress: whether to show a bar over a DataLoader, by tqdm.
            draws: samples of each member, generator, draws_at_once, rows_at_once and pick, see `DrawOptions`.

        Raises:
            UsageError: no likelihood is given, and the losses of the members stand for several.
            PersampleError: as `Posterior.predict`.
        """
        likelihood = likelihood or self._likelihood()
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

    def save(self, folder: str | PathLike[str]) -> None:
        """Write each member to a safetensors file in `folder`, which is made if it is missing.

        An ensemble that was saved there before is replaced. The models are not saved.

        Args:
            folder: where to write.

        Raises:
            MissingPackageError: the package safetensors is not installed.
            DataError: the folder, or a file in it, cannot be written.
        """
        place = Path(folder)
        try:
            place.mkdir(parents=True, exist_ok=True)
            (place / _INDEX).unlink(missing_ok=True)  # until all members are there, there is no ensemble
            for index, member in enumerate(self.members):
                member.save(place / _member(index))
            with replacing(place / _INDEX) as temporary:
                temporary.write_text(json.dumps(_HEADER | {"members": len(self.members)}), encoding="utf-8")
        except OSError as error:
            raise DataError(f"{place} cannot be written ({error}): choose a folder that can.") from error

    @staticmethod
    def load(
        folder: str | PathLike[str],
        models: nn.Module | Iterable[nn.Module],
        *,
        loss_fn: Callable[[Any, Any], Any] | None = None,
        device: torch.device | str | None = None,
    ) -> Ensemble:
        """Read what `save` wrote.

        Args:
            folder: where it was written.
            models: the networks of the members, in order; or one, if they differ in their weights alone. They are not
                changed.
            loss_fn: as for `Posterior.load`.
            device: likewise.

        Raises:
            MissingPackageError: the package safetensors is not installed.
            OptionError: there are more or fewer models than members; or no such device.
            DataError: the ensemble is missing or damaged.
        """
        place = Path(folder)
        count = _members_in(place / _INDEX)
        found = [models] * count if isinstance(models, nn.Module) else list(models)
        if len(found) != count:
            raise OptionError(f"{place} has {count} members, but {len(found)} models were given: pass one for each.")
        return Ensemble(
            Posterior.load(place / _member(index), model, loss_fn=loss_fn, device=device)
            for index, model in enumerate(found)
        )

    def _likelihood(self) -> Likelihood | Summarised:
        first, *others = (likelihood_of(member.loss_fn) for member in self.members)
        if any(other != first for other in others):
            raise UsageError("The members were trained with losses of several likelihoods: pass likelihood=...")
        return first

    def _over(self, batches: Iterable[Any], draws: DrawOptions, ask: Callable[[Any], Any]) -> Iterable[Any]:
        devices = {mean.device for member in self.members for mean in member.mean.values()}
        return at_the_same_draws(batches, draws.get("generator"), devices, ask)
