"""Ensembles of posteriors: averages over the draws of all members."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from persample import Ensemble, losses
from persample.errors import DataError, OptionError
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


class TestSaving:
    @pytest.fixture(autouse=True)
    def _needs_safetensors(self) -> None:
        pytest.importorskip("safetensors")

    def test_what_was_saved_predicts_the_same(self, x: Tensor, tmp_path: Path) -> None:
        folder = tmp_path / "new" / "ensemble"
        ensemble = Ensemble([broad_posterior(model) for model in networks()])
        ensemble.save(folder)
        due = ensemble.predict(x, samples=4, generator=generator_of(2)).probabilities
        for models in (networks(), networks(1)[0]):  # whose own weights do not matter
            loaded = Ensemble.load(folder, models)
            found = loaded.predict(x, samples=4, generator=generator_of(2)).probabilities
            assert torch.equal(found, due)

    def test_networks_without_a_posterior(self, x: Tensor, tmp_path: Path) -> None:
        models = networks()
        Ensemble.of_models(models).save(tmp_path)
        found = Ensemble.load(tmp_path, networks()).predict(x, samples=1).probabilities
        torch.testing.assert_close(found, torch.stack([model(x).softmax(1) for model in models]).mean(0))

    def test_a_smaller_one_replaces_a_larger_one(self, x: Tensor, tmp_path: Path) -> None:
        Ensemble([broad_posterior(model) for model in networks(3)]).save(tmp_path)
        Ensemble([broad_posterior(model) for model in networks(2)]).save(tmp_path)
        assert len(Ensemble.load(tmp_path, networks(2)).members) == 2
        with pytest.raises(OptionError, match="2 members, but 3 models"):
            Ensemble.load(tmp_path, networks(3))

    def test_what_is_damaged_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"ensemble\.json cannot be read"):
            Ensemble.load(tmp_path, networks())
        ensemble = Ensemble([broad_posterior(model) for model in networks()])
        ensemble.save(tmp_path)
        index = tmp_path / "ensemble.json"
        for text in ("[]", "{", index.read_text(encoding="utf-8").replace("3", "0"), '{"members": 3}'):
            ensemble.save(tmp_path)
            index.write_text(text, encoding="utf-8")
            with pytest.raises(DataError, match="ensemble"):
                Ensemble.load(tmp_path, networks())
        ensemble.save(tmp_path)
        (tmp_path / "member-1.safetensors").unlink()
        with pytest.raises(DataError, match=r"member-1\.safetensors does not exist"):
            Ensemble.load(tmp_path, networks())
        (tmp_path / "file").touch()
        with pytest.raises(DataError, match="cannot be written"):
            ensemble.save(tmp_path / "file")
