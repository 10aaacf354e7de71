"""The evidence lower bound, against NumPy on the outputs of each draw."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch.nn.functional as F
from torch import Tensor, nn

from persample import losses
from persample.errors import BatchError, LossError, OptionError
from persample.vogn import VOGN

from .draws_by_hand import outputs_by_hand, seeded

Train = Callable[..., None]
Batch = tuple[Tensor, Tensor]


@pytest.mark.parametrize("draws_at_once", [1, 3])
def test_against_numpy(draws_at_once: int, model: nn.Module, vogn: VOGN, batch: Batch, train: Train) -> None:
    train(vogn)
    logits = outputs_by_hand(model, vogn.posterior, batch[0], 5)
    rows = logits - np.log(np.exp(logits).sum(2, keepdims=True))
    log_likelihoods = rows[:, np.arange(6), batch[1].numpy(force=True)]
    table = vogn.posterior.log_likelihoods(
        losses.cross_entropy, *batch, samples=5, generator=seeded(), draws_at_once=draws_at_once
    )
    np.testing.assert_allclose(table.numpy(force=True), log_likelihoods, rtol=1e-11)

    elbo = vogn.elbo(*batch, samples=5, generator=seeded(), draws_at_once=draws_at_once)
    totals = log_likelihoods.mean(1) * 100  # data_size
    kl = 0.0
    for p in model.parameters():
        precision = 100 * vogn.state[p]["curvature"].numpy(force=True) + 1
        kl += 0.5 * (1 / precision + p.detach().numpy(force=True) ** 2 - 1 + np.log(precision)).sum()
    np.testing.assert_allclose(elbo.log_likelihoods.numpy(force=True), totals, rtol=1e-11)
    assert elbo.kl == pytest.approx(kl, rel=1e-12)
    assert elbo.log_likelihood == pytest.approx(totals.mean(), rel=1e-12)
    assert elbo.total == pytest.approx(totals.mean() - kl, rel=1e-12)
    assert elbo.per_sample == pytest.approx((totals.mean() - kl) / 100, rel=1e-12)
    assert elbo.standard_error == pytest.approx(totals.std(ddof=1) / 5**0.5, rel=1e-9)


def test_without_a_size_the_data_are_all(vogn: VOGN, batch: Batch) -> None:
    elbo = vogn.posterior.elbo(losses.cross_entropy, *batch, prior=2.0, samples=3)
    assert elbo.data_size == 6
    assert elbo.kl == pytest.approx(vogn.posterior.kl(2.0).item())


def test_a_flat_prior_is_refused(model: nn.Module, make_vogn: Callable[..., VOGN], batch: Batch) -> None:
    with pytest.raises(OptionError, match="flat prior"):
        make_vogn(model, prior_precision=0.0).elbo(*batch)


def test_a_scalar_loss_is_refused(vogn: VOGN, batch: Batch) -> None:
    with pytest.raises(LossError, match="scalar"):
        vogn.posterior.elbo(F.cross_entropy, *batch, prior=1.0)


@pytest.mark.parametrize("rows_at_once", [None, 4])
def test_targets_of_another_length_are_refused(rows_at_once: int | None, vogn: VOGN, batch: Batch) -> None:
    x, y = batch
    with pytest.raises(BatchError, match=f"inputs has {len(x)} samples, but targets has {len(x) - 1}"):
        vogn.elbo(x, y[:-1], rows_at_once=rows_at_once)
    assert vogn.elbo(x, y.tolist(), samples=2, generator=seeded()).log_likelihood == pytest.approx(
        vogn.elbo(x, y, samples=2, generator=seeded(), rows_at_once=rows_at_once).log_likelihood
    )
