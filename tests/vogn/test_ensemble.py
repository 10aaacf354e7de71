"""Ensembles of posteriors: averages over the draws of all members."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from persample import Ensemble, losses
from persample.errors import OptionError
from persample.likelihoods import Gaussian
from persample.testing.devices import generator_of
from persample.vogn import Posterior

from .draws_by_hand import broad_posterior, outputs_by_hand


def networks(number: int = 3) -> list[nn.Module]:
    torch.manual_seed(0)
    return [nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double() for _ in range(number)]


@pytest.fixture
def x() -> Tensor:
    return torch.randn(9, 3, generator=generator_of(1), dtype=torch.float64)


def test_predictions_by_hand(x: Tensor) -> None:
    members = [broad_posterior(model) for model in networks()]
    found = []
    for member in members:
        outputs = torch.as_tensor(outputs_by_hand(member.model, member, x, 5))  # type: ignore[arg-type]
        found.append(outputs.softmax(2))
    due = [m.predict(x, samples=5, generator=generator_of(0)).probabilities for m in members]
    for by_hand, alone in zip(found, due, strict=True):
        torch.testing.assert_close(by_hand.mean(0), alone)

    torch.manual_seed(4)
    together = Ensemble(members).predict(x, samples=5)
    torch.manual_seed(4)
    alone = torch.stack([m.predict(x, samples=5).probabilities for m in members])
    torch.testing.assert_close(together.probabilities, alone.mean(0))
    assert bool((together.mutual_information > 0).all())


def test_of_models(x: Tensor) -> None:
    """One draw of each, without noise: the average of the softmaxes, and the spread of the outputs."""
    models = networks()
    with torch.no_grad():
        outputs = torch.stack([model(x) for model in models])
    ensemble = Ensemble.of_models(models)
    torch.testing.assert_close(ensemble.predict(x, samples=1).probabilities, outputs.softmax(2).mean(0))
    predicted = ensemble.predict(x, likelihood=Gaussian(4.0), samples=1)
    torch.testing.assert_close(predicted.epistemic_variance, outputs.var(0))
    table = ensemble.log_likelihoods(losses.cross_entropy, x, torch.zeros(9).long(), samples=1)
    torch.testing.assert_close(table, outputs.log_softmax(2)[:, :, 0])


def test_over_a_loader(x: Tensor) -> None:
    ensemble, y = Ensemble(broad_posterior(model) for model in networks()), torch.ones(9).long()
    loader = DataLoader(TensorDataset(x, y), 4)
    parts = ensemble.predict(loader, samples=4, generator=generator_of(0)).probabilities
    torch.testing.assert_close(parts, ensemble.predict(x, samples=4, generator=generator_of(0)).probabilities)
    table = ensemble.log_likelihoods(losses.cross_entropy, loader, samples=4, generator=generator_of(0))
    due = ensemble.log_likelihoods(losses.cross_entropy, x, y, samples=4, generator=generator_of(0))
    torch.testing.assert_close(table, due)
    assert table.shape == (12, 9)


def test_refusals() -> None:
    with pytest.raises(OptionError, match="at least one"):
        Ensemble([])
    with pytest.raises(OptionError, match="Member 0 of the ensemble has no model"):
        Ensemble([Posterior({"a": torch.ones(1)}, {"a": torch.full((1,), math.inf)})])
    with pytest.raises(OptionError, match="Member 0 of the ensemble has the type Linear"):
        Ensemble([nn.Linear(2, 2)])  # type: ignore[list-item]
