"""Training goes on with an earlier posterior as the prior."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from persample import VOGN, Prior, losses
from persample.vogn import OGN

Batch = tuple[Tensor, Tensor]


def squared(outputs: Tensor, targets: Tensor) -> Tensor:
    return losses.gaussian(outputs, targets, noise_precision=4.0)


def test_the_posterior_becomes_the_prior(
    model: nn.Module,
    vogn: VOGN,
    train: Callable[..., None],
    make_vogn: Callable[..., VOGN],
    batch: tuple[Tensor, Tensor],
) -> None:
    train(vogn)
    before = vogn.posterior
    again = make_vogn(model, prior=before.as_prior(), hess_init=0.0)
    for name in before.mean:
        assert torch.equal(again.prior.mean[name], before.mean[name])
        assert torch.equal(again.prior.precision[name], before.precision[name])
    # From s = 0 the posterior is the prior until the first step.
    assert again.posterior.kl(before).item() == pytest.approx(0, abs=1e-12)
    assert again.elbo(*batch, samples=2).kl == pytest.approx(0, abs=1e-12)


def test_two_halves_give_what_all_data_give() -> None:
    """A location with known noise: its posterior is Gaussian, and one step of Newton's method finds it."""

    class Location(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.value = nn.Parameter(torch.zeros(1, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return self.value.expand(len(x), 1)

    y = torch.tensor([[1.0], [2.0], [4.0], [-1.0], [0.5], [3.0]], dtype=torch.float64)
    model, prior = Location(), Prior.isotropic(0.5, {"value": torch.zeros(1, dtype=torch.float64)})
    for part in (y[:4], y[4:]):
        # The curvature of each loss is the noise's precision, 4, and stays so.
        optimizer = OGN(
            model,
            squared,
            data_size=len(part),
            lr=1.0,
            decay=1.0,
            hess_init=4.0,
            momentum=0.0,
            temperature=1.0,
            backend="loop",
            prior=prior,
        )
        optimizer.observe(part, part)
        optimizer.step()
        prior = optimizer.posterior.as_prior()
    assert prior.precision["value"].item() == pytest.approx(0.5 + 4.0 * 6)
    assert prior.mean["value"].item() == pytest.approx((4.0 * y.sum() / (0.5 + 4.0 * 6)).item())
