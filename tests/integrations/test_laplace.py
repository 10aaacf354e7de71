"""laplace-torch with the diagonals of this package, and beside `persample.laplace`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import persample
from persample.errors import OptionError
from persample.testing.devices import generator_of

laplace = pytest.importorskip("laplace", reason="laplace-torch is not installed: pip install laplace-torch")

from laplace.curvature import CurvlinopsEF  # noqa: E402

from persample.integrations.laplace import EmpiricalFisher, MonteCarloFisher  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


class Net(nn.Sequential):
    def __init__(self, outputs: int) -> None:
        torch.manual_seed(0)
        layers = (nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(18, 4), nn.Tanh(), nn.Linear(4, outputs))
        super().__init__(*layers)


def data(likelihood: str) -> TensorDataset:
    g = generator_of(1)
    x = torch.randn(20, 1, 5, 5, generator=g, dtype=torch.float64)
    if likelihood == "classification":
        return TensorDataset(x, torch.randint(3, (20,), generator=g))
    return TensorDataset(x, torch.randn(20, 2, generator=g, dtype=torch.float64))


def fitted(likelihood: str, subset: str = "all", backend: Any = EmpiricalFisher, **settings: Any) -> Any:
    model = Net(3 if likelihood == "classification" else 2).double()
    settings = {"hessian_structure": "diag", **settings}
    found = laplace.Laplace(model, likelihood, subset_of_weights=subset, backend=backend, **settings)
    found.fit(DataLoader(data(likelihood), 8))
    return found


def rows(model: nn.Module, likelihood: str, targets: Tensor | None = None) -> Tensor:
    """The gradients of the single samples' −log p(y | x), shape (N, P)."""
    inputs, known = data(likelihood).tensors
    found = []
    for x, y in zip(inputs, known if targets is None else targets, strict=True):
        out = model(x[None])
        loss = F.cross_entropy(out, y[None]) if likelihood == "classification" else 0.5 * (out - y).square().sum()
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
    return torch.stack(found)


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
@pytest.mark.parametrize("backend", ["fused", "loop"])
def test_the_empirical_fisher_is_the_sum_of_squares(likelihood: str, backend: str) -> None:
    found = fitted(likelihood, backend_kwargs={"backend": backend})
    due = rows(found.model, likelihood)
    torch.testing.assert_close(found.H, due.square().sum(0))
    full = fitted(likelihood, hessian_structure="full")
    torch.testing.assert_close(full.H, due.T @ due)


def test_of_the_last_layer() -> None:
    """Of which laplace-torch's own diagonal is zero everywhere."""
    found, whole = fitted("classification", "last_layer"), fitted("classification")
    torch.testing.assert_close(found.H, whole.H[-15:])
    assert found.H.min() > 0


def test_the_loss_is_that_of_laplace_torch() -> None:
    for likelihood in ("classification", "regression"):
        own = fitted(likelihood, backend=CurvlinopsEF, hessian_structure="full")
        torch.testing.assert_close(torch.as_tensor(fitted(likelihood).loss), torch.as_tensor(own.loss))


def test_beside_laplace_torchs_own_diagonal() -> None:
    """The same for classes; for real numbers half of it, where its factor ½ belongs into the square."""
    classes = fitted("classification", backend=CurvlinopsEF)
    torch.testing.assert_close(classes.H, fitted("classification").H)
    numbers = fitted("regression", backend=CurvlinopsEF)
    torch.testing.assert_close(numbers.H, 2 * fitted("regression").H)


def test_persample_laplace_is_laplace_torchs_empirical_diagonal() -> None:
    """The same precision, for the same prior precision, and nearly the same best one."""
    theirs = fitted("classification", backend=CurvlinopsEF)
    loader = DataLoader(data("classification"), 8)
    model = Net(3).double()
    posterior = persample.laplace(model, loader, loss_fn=persample.losses.cross_entropy, prior_precision=2.5)
    theirs.prior_precision = 2.5
    precision = torch.cat([p.flatten() for p in posterior.precision.values()])
    torch.testing.assert_close(precision, theirs.posterior_precision)
    best = persample.laplace(model, loader, loss_fn=persample.losses.cross_entropy)
    own = (best.precision["0.weight"] - posterior.precision["0.weight"]).mean().item() + 2.5
    theirs.optimize_prior_precision(method="marglik", n_steps=3000, lr=1e-2)
    assert own == pytest.approx(theirs.prior_precision.item(), rel=1e-2)


def test_the_monte_carlo_fisher_tends_to_the_exact_one() -> None:
    settings = {"draws": 2000, "generator": generator_of(3)}
    found = fitted("classification", backend=MonteCarloFisher, backend_kwargs=settings)
    loader = DataLoader(data("classification"), 20)
    exact = persample.fisher(Net(3).double(), loader, loss_fn=persample.losses.cross_entropy, kind="exact")
    due = 20 * torch.cat([value.flatten() for value in exact.diagonal.values()])
    assert ((found.H - due).norm() / due.norm()).item() < 0.03
    with pytest.raises(OptionError, match="draws=0"):
        fitted("classification", backend=MonteCarloFisher, backend_kwargs={"draws": 0})


def test_predictions_of_laplace_torch_work_with_it() -> None:
    found = fitted("classification")
    inputs = data("classification").tensors[0]
    probabilities = found(inputs, pred_type="glm", link_approx="probit")
    torch.testing.assert_close(probabilities.sum(1), torch.ones(20).double())
    assert not found.model.training


@pytest.mark.parametrize("structure", ["diag", "full"])
def test_of_a_subnetwork(structure: str) -> None:
    chosen = torch.tensor([0, 7, 40])
    found = fitted("classification", "subnetwork", hessian_structure=structure, subnetwork_indices=chosen)
    due = rows(found.model, "classification")[:, chosen]
    due = due.square().sum(0) if structure == "diag" else due.T @ due
    torch.testing.assert_close(found.H, due)
    assert found(data("classification").tensors[0]).shape == (20, 3)


def test_kronecker_factors_are_refused() -> None:
    with pytest.raises(OptionError, match=r'pass Laplace\(\.\.\., hessian_structure="diag"\)'):
        fitted("classification", hessian_structure="kron")
