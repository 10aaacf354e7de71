"""Predictions and bounds over a DataLoader are those of all its samples at once."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from persample import losses
from persample.errors import BatchError, UsageError
from persample.likelihoods import Categorical, Gaussian
from persample.testing.devices import generator_of
from persample.vogn import VOGN, Posterior

from .draws_by_hand import broad_posterior
from .ways import network


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    g = generator_of(1)
    return torch.randn(11, 3, generator=g, dtype=torch.float64), torch.randint(2, (11,), generator=g)


class Named(nn.Module):
    """Takes a dict, and returns an object with logits, as models of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()

    def forward(self, x: Tensor) -> Any:
        return SimpleNamespace(logits=self.inner(x))


def dicts(x: Tensor, y: Tensor) -> Any:
    rows = [{"x": a, "labels": b} for a, b in zip(x, y, strict=True)]
    return DataLoader(rows, batch_size=4)  # type: ignore[arg-type]


def pairs(x: Tensor, y: Tensor) -> Any:
    return DataLoader(TensorDataset(x, y), batch_size=4)


@pytest.mark.parametrize("kind", ["pairs", "inputs alone", "dicts and logits"])
def test_predictions_are_those_of_all_at_once(kind: str, data: tuple[Tensor, Tensor]) -> None:
    x, y = data
    model = Named() if kind == "dicts and logits" else network()
    loader = {"pairs": pairs(x, y), "inputs alone": DataLoader(TensorDataset(x), 4), "dicts and logits": dicts(x, y)}
    posterior = broad_posterior(model)
    found, due = [], []
    for inputs, kept in ((loader[kind], found), (x, due)):
        generator = generator_of(2)
        kept.append(posterior.predict(inputs, samples=5, generator=generator))
        kept.append(torch.randn(2, generator=generator))  # the generator is left where one call leaves it
    for name, value in vars(due[0]).items():
        torch.testing.assert_close(vars(found[0])[name], value)
    assert torch.equal(found[1], due[1])


def test_all_batches_meet_the_same_draws_of_the_global_generator(data: tuple[Tensor, Tensor]) -> None:
    """Also where the loader takes random numbers from it: equal samples get equal predictions."""
    x, y = data

    class Random(TensorDataset):
        def __getitem__(self, index: int) -> Any:
            torch.rand(3)
            return super().__getitem__(index)

    posterior = broad_posterior(network())
    same = posterior.predict(DataLoader(Random(x[:1].repeat(11, 1), y), 4), samples=5).probabilities
    torch.testing.assert_close(same, same[:1].expand_as(same))


def test_real_numbers(data: tuple[Tensor, Tensor]) -> None:
    posterior, (x, _) = broad_posterior(network()), data
    one = posterior.predict(pairs(x, x), likelihood=Gaussian(2.0), samples=5, generator=generator_of(2))
    all_at_once = posterior.predict(x, likelihood=Gaussian(2.0), samples=5, generator=generator_of(2))
    torch.testing.assert_close(one.variance, all_at_once.variance)


@pytest.mark.parametrize("kind", ["pairs", "dicts and logits"])
def test_the_bound(kind: str, data: tuple[Tensor, Tensor]) -> None:
    x, y = data
    model = Named() if kind == "dicts and logits" else network()
    loader = dicts(x, y) if kind == "dicts and logits" else pairs(x, y)
    optimizer = VOGN(model, losses.cross_entropy, data_size=11)
    found = optimizer.elbo(loader, samples=4, generator=generator_of(2))
    due = optimizer.elbo(x, y, samples=4, generator=generator_of(2))
    torch.testing.assert_close(found.log_likelihoods, due.log_likelihoods)
    assert found.kl == due.kl


def test_an_optimizers_own_generator(data: tuple[Tensor, Tensor]) -> None:
    x, y = data
    predicted = []
    for inputs in (pairs(x, y), x):
        optimizer = VOGN(network(), losses.cross_entropy, data_size=11, generator=generator_of(2))
        predicted.append(optimizer.predict(inputs, samples=4).probabilities)
    torch.testing.assert_close(*predicted)


def test_refusals(data: tuple[Tensor, Tensor]) -> None:
    x, y = data
    posterior: Posterior = broad_posterior(network())
    with pytest.raises(UsageError, match="provides its own targets"):
        posterior.log_likelihoods(losses.cross_entropy, pairs(x, y), y)
    with pytest.raises(BatchError, match="let the loader yield pairs"):
        posterior.log_likelihoods(losses.cross_entropy, DataLoader(TensorDataset(x), 4))
    with pytest.raises(BatchError, match="has no batch"):
        posterior.predict(DataLoader([]))  # type: ignore[arg-type]


def test_progress_shows_a_bar(data: tuple[Tensor, Tensor], capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm")
    posterior = broad_posterior(network())
    posterior.predict(pairs(*data), samples=2, progress=True)
    assert "3/3" in capsys.readouterr().err


@pytest.mark.parametrize("by", ["a function", "a likelihood"])
def test_a_loss_of_logits_serves_training_and_bound(by: str, data: tuple[Tensor, Tensor]) -> None:
    """The model returns an object, of which the user's loss takes the logits."""
    x, y = data
    model = Named()

    def of_logits(outputs: Any, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs.logits, targets, reduction="none")

    loss_fn = of_logits if by == "a function" else Categorical()
    optimizer = VOGN(model, loss_fn, data_size=len(y), generator=generator_of(0))
    optimizer.observe({"x": x}, y)
    optimizer.step()
    due = optimizer.posterior.log_likelihoods(losses.cross_entropy, {"x": x}, y, samples=4, generator=generator_of(2))
    found = optimizer.elbo(dicts(x, y), samples=4, generator=generator_of(2))
    torch.testing.assert_close(found.log_likelihoods, due.sum(1))


def test_real_numbers_with_a_known_noise(data: tuple[Tensor, Tensor]) -> None:
    x, y = data
    optimizer = VOGN(network(), losses.gaussian, data_size=11)
    for predict in (optimizer.predict_gaussian, optimizer.posterior.predict_gaussian):
        due = predict(x, noise_precision=4.0, samples=5, generator=generator_of(2))
        found = predict(pairs(x, y), noise_precision=4.0, samples=5, generator=generator_of(2))
        for name, value in vars(due).items():
            torch.testing.assert_close(vars(found)[name], value)


def test_more_than_inputs_and_targets(data: tuple[Tensor, Tensor]) -> None:
    x, y = data
    with pytest.raises(BatchError, match=r"of type list with 3 entries: let the loader yield pairs"):
        broad_posterior(network()).predict(DataLoader(TensorDataset(x, y, y), 4))
