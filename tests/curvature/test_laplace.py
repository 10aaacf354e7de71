"""The Laplace approximation and the EWC penalty, against what they are by definition."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import persample
from persample import Fisher, Prior, ewc_penalty, fisher, laplace, losses
from persample.errors import OptionError
from persample.testing.devices import generator_of


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def batches() -> list[tuple[Tensor, Tensor]]:
    g = generator_of(1)
    return [
        (torch.randn(6, 4, generator=g, dtype=torch.float64), torch.randint(3, (6,), generator=g)) for _ in range(4)
    ]


@pytest.mark.parametrize("kind", ["empirical", "exact"])
def test_mean_and_precision(kind: Any) -> None:
    model = network()
    posterior = laplace(model, batches(), loss_fn=losses.cross_entropy, kind=kind, prior_precision=2.5)
    diagonal = fisher(model, batches(), loss_fn=losses.cross_entropy, kind=kind).diagonal
    for name, p in model.named_parameters():
        assert torch.equal(posterior.mean[name], p)
        torch.testing.assert_close(posterior.precision[name], 24 * diagonal[name] + 2.5)
    assert posterior.predict(batches()[0][0], samples=3).probabilities.shape == (6, 3)


def test_linear_regression_is_its_own_laplace() -> None:
    """One weight, unit noise: the posterior precision is Σ x² + λ, whatever the targets."""
    model = nn.Linear(1, 1, bias=False).double()
    x = torch.randn(20, 1, generator=generator_of(0), dtype=torch.float64)
    posterior = laplace(model, [(x, x)], loss_fn=losses.gaussian, kind="exact", prior_precision=3.0)
    torch.testing.assert_close(posterior.precision["weight"], x.square().sum().view(1, 1) + 3.0)


def test_the_prior_precision_has_the_largest_evidence() -> None:
    """Found again on a fine grid, from the evidence as it is written."""
    model = network()
    information = fisher(model, batches(), loss_fn=losses.cross_entropy)
    posterior = laplace(model, information)
    w = np.concatenate([p.detach().numpy(force=True).ravel() for p in model.parameters()])
    nf = np.concatenate([24 * t.numpy(force=True).ravel() for t in information.diagonal.values()])
    grid = np.exp(np.linspace(-8, 8, 160001))
    evidence = [0.5 * np.sum(np.log(g) - np.log(nf + g) - g * w**2) for g in grid[::40]]
    best = grid[::40][int(np.argmax(evidence))]
    found = (posterior.precision["0.weight"] - 24 * information.diagonal["0.weight"]).mean().item()
    assert found == pytest.approx(best, rel=5e-3)


def test_refusals() -> None:
    model, information = network(), fisher(network(), batches(), loss_fn=losses.cross_entropy)
    with pytest.raises(OptionError, match="loss_fn is missing"):
        laplace(model, batches())
    with pytest.raises(OptionError, match="nothing left to compute"):
        laplace(model, information, kind="exact")
    for value in (0.0, -1.0, float("nan"), "evidence", True):
        with pytest.raises(OptionError, match="prior_precision="):
            laplace(model, information, prior_precision=value)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match=r"has '0\.weight', which this model does not have"):
        laplace(nn.Linear(2, 2), information)
    with pytest.raises(OptionError, match="has no maximum"):
        laplace(model, Fisher({"0.bias": torch.zeros(5)}, 3))


def test_the_penalty_is_minus_the_log_density() -> None:
    """Up to a constant; its gradient is that of the prior."""
    model = network()
    before = laplace(model, batches(), loss_fn=losses.cross_entropy, prior_precision=2.0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3)
    weights = dict(model.named_parameters())
    constant = before.log_prob(before.mean)
    torch.testing.assert_close(ewc_penalty(model, before), constant - before.log_prob(weights))
    ewc_penalty(model, before.as_prior()).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, before.precision[name] * 0.3)
    with pytest.raises(OptionError, match=r"no parameter '0\.weight'"):
        ewc_penalty(nn.Linear(2, 2), before)
    with pytest.raises(OptionError, match=r"before is of type Fisher: pass a posterior or a prior.*persample\.laplace"):
        ewc_penalty(model, fisher(model, batches(), loss_fn=losses.cross_entropy))  # type: ignore[arg-type]


def test_ewc_keeps_what_was_learned() -> None:
    """Two tasks one after the other: with the penalty the first is forgotten less."""
    g = generator_of(3)
    x = torch.randn(200, 4, generator=g, dtype=torch.float64)
    tasks = [(x, (x[:, k] > 0).long()) for k in (0, 1)]

    def train(model: nn.Module, task: tuple[Tensor, Tensor], penalty: Any = None) -> None:
        adam = torch.optim.Adam(model.parameters(), lr=0.02)
        for _ in range(150):
            loss = losses.cross_entropy(model(task[0]), task[1]).mean()
            if penalty is not None:
                loss = loss + penalty() / 200
            adam.zero_grad()
            loss.backward()
            adam.step()

    forgotten = []
    for with_penalty in (False, True):
        model = network()
        train(model, tasks[0])
        before: persample.Posterior | Prior = laplace(
            model, [tasks[0]], loss_fn=losses.cross_entropy, kind="exact", prior_precision=1e-3
        )
        train(model, tasks[1], (lambda m=model, b=before: ewc_penalty(m, b)) if with_penalty else None)
        forgotten.append(losses.cross_entropy(model(tasks[0][0]), tasks[0][1]).mean().item())
    assert forgotten[1] < 0.9 * forgotten[0]
