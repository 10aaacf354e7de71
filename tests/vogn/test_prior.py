from __future__ import annotations

import math

import pytest
import torch

from persample import Prior
from persample.errors import OptionError


def test_isotropic_has_mean_zero_and_one_precision() -> None:
    like = {"a": torch.ones(2, 3, dtype=torch.float64), "b": torch.ones(4)}
    prior = Prior.isotropic(2.5, like)
    for name, value in like.items():
        assert torch.equal(prior.mean[name], torch.zeros_like(value))
        assert torch.equal(prior.precision[name], torch.full_like(value, 2.5))


@pytest.mark.parametrize(
    ("mean", "precision", "match"),
    [
        ({"a": torch.zeros(2)}, {"b": torch.ones(2)}, "'a' is only in one"),
        ({"a": torch.zeros(2)}, {"a": torch.ones(3)}, "same shape"),
        ({"a": torch.zeros(2)}, {"a": torch.tensor([1.0, -1.0])}, "precision >= 0"),
        ({"a": torch.zeros(2)}, {"a": torch.tensor([1.0, math.inf])}, "'a' needs"),
        ({"a": torch.tensor([0.0, math.nan])}, {"a": torch.ones(2)}, "finite mean"),
    ],
)
def test_what_is_no_prior_is_refused(
    mean: dict[str, torch.Tensor], precision: dict[str, torch.Tensor], match: str
) -> None:
    with pytest.raises(OptionError, match=match):
        Prior(mean, precision)
