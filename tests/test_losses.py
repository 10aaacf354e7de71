"""Losses against NumPy, and the losses of `torch.nn` made one per sample."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from persample import losses
from persample.errors import LossError, NonFiniteLossError, PersampleError
from persample.testing.devices import generator_of

positions = st.lists(st.integers(1, 3), max_size=2)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator_of(seed), dtype=torch.float64)


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    """log softmax over dim 1."""
    shifted = logits - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


# The package's own losses.


@given(size=st.integers(1, 4), classes=st.integers(1, 4), inner=positions, seed=st.integers(0, 1000))
def test_cross_entropy_of_labels(size: int, classes: int, inner: list[int], seed: int) -> None:
    outputs = normal(seed, size, classes, *inner)
    labels = torch.randint(classes, (size, *inner), generator=generator_of(seed))
    logs = log_probabilities(outputs.numpy(force=True))
    expected = np.zeros(size)
    for index in np.ndindex(size, *inner):
        expected[index[0]] -= logs[(index[0], labels[index].item(), *index[1:])]
    np.testing.assert_allclose(losses.cross_entropy(outputs, labels), expected, rtol=1e-12, atol=1e-14)


@given(size=st.integers(1, 4), classes=st.integers(1, 4), inner=positions, seed=st.integers(0, 1000))
def test_cross_entropy_of_probabilities(size: int, classes: int, inner: list[int], seed: int) -> None:
    outputs, targets = normal(seed, size, classes, *inner), normal(seed + 1, size, classes, *inner).softmax(1)
    expected = -(targets.numpy(force=True) * log_probabilities(outputs.numpy(force=True))).reshape(size, -1).sum(1)
    np.testing.assert_allclose(losses.cross_entropy(outputs, targets), expected, rtol=1e-12, atol=1e-14)


@given(size=st.integers(1, 4), inner=positions, precision=st.floats(0.01, 100), seed=st.integers(0, 1000))
def test_gaussian(size: int, inner: list[int], precision: float, seed: int) -> None:
    outputs, targets = normal(seed, size, *inner), normal(seed + 1, size, *inner)
    variance = 1 / precision
    density = np.exp(-((targets - outputs).numpy(force=True) ** 2) / (2 * variance)) / np.sqrt(2 * math.pi * variance)
    found = losses.gaussian(outputs, targets, noise_precision=precision)
    entries = 0.5 * precision * (targets - outputs).numpy(force=True) ** 2 - 0.5 * np.log(precision / (2 * math.pi))
    np.testing.assert_allclose(found, entries.reshape(size, -1).sum(1), rtol=1e-12, atol=1e-12)
    if (density > 1e-300).all():
        np.testing.assert_allclose(found, -np.log(density).reshape(size, -1).sum(1), rtol=1e-9, atol=1e-9)


@given(size=st.integers(1, 4), inner=positions, seed=st.integers(0, 1000))
def test_bernoulli(size: int, inner: list[int], seed: int) -> None:
    outputs = normal(seed, size, *inner)
    targets = (normal(seed + 1, size, *inner) > 0).long()
    probability = 1 / (1 + np.exp(-outputs.numpy(force=True)))
    entries = -np.log(np.where(targets.numpy(force=True) == 1, probability, 1 - probability))
    np.testing.assert_allclose(losses.bernoulli(outputs, targets), entries.reshape(size, -1).sum(1), rtol=1e-10)


@pytest.mark.parametrize("loss", [losses.gaussian, losses.bernoulli])
@pytest.mark.parametrize(("outputs", "targets"), [((3, 1), (3,)), ((3,), (3, 1)), ((3, 2), (1, 2)), ((3, 2), (3,))])
def test_broadcasting_is_refused(loss: Callable[..., Tensor], outputs: Any, targets: Any) -> None:
    with pytest.raises(LossError, match=r"same shape, for example with targets.unsqueeze\(1\)"):
        loss(torch.zeros(outputs), torch.zeros(targets))


# Losses of torch.nn.

_CLASS_WEIGHTS = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    ("loss", "targets"),
    [
        (nn.CrossEntropyLoss, torch.tensor([0, 2, 1, 1])),
        (lambda **options: nn.CrossEntropyLoss(weight=_CLASS_WEIGHTS, **options), torch.tensor([0, 2, 1, 1])),
        (lambda **options: nn.CrossEntropyLoss(ignore_index=1, **options), torch.tensor([0, 2, 1, 1])),
        (lambda **options: nn.CrossEntropyLoss(label_smoothing=0.2, **options), torch.tensor([0, 2, 1, 1])),
        (nn.NLLLoss, torch.tensor([0, 2, 1, 1])),
        (nn.MultiMarginLoss, torch.tensor([0, 2, 1, 1])),
        (nn.MSELoss, normal(1, 4, 3)),
        (nn.L1Loss, normal(1, 4, 3)),
        (nn.SmoothL1Loss, normal(1, 4, 3)),
        (nn.HuberLoss, normal(1, 4, 3)),
        (nn.BCEWithLogitsLoss, normal(1, 4, 3).sigmoid()),
        (nn.PoissonNLLLoss, normal(1, 4, 3).exp()),
        (nn.SoftMarginLoss, normal(1, 4, 3).sign()),
        (nn.KLDivLoss, normal(1, 4, 3).softmax(1)),
        (nn.MultiLabelSoftMarginLoss, (normal(1, 4, 3) > 0).double()),
    ],
)
def test_loss_module_is_summed_for_each_sample(loss: Callable[..., nn.Module], targets: Tensor, reduction: str) -> None:
    outputs = normal(0, 4, 3)
    module = loss(reduction=reduction)
    found = losses.as_per_sample(module)(outputs, targets)
    entries = loss(reduction="none")
    expected = [entries(outputs[i : i + 1], targets[i : i + 1]).sum().item() for i in range(4)]
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-15)
    assert module.reduction == reduction, "the user's module must stay as it is"


def test_loss_module_with_positions() -> None:
    outputs, targets = (
        normal(0, 4, 3, 2),
        torch.randint(3, (4, 2), generator=generator_of(0)),
    )
    found = losses.as_per_sample(nn.CrossEntropyLoss())(outputs, targets)
    torch.testing.assert_close(found, losses.cross_entropy(outputs, targets))


@pytest.mark.parametrize("loss", [nn.MSELoss(), nn.L1Loss(), nn.SmoothL1Loss(), nn.HuberLoss(), nn.PoissonNLLLoss()])
def test_loss_module_refuses_broadcasting(loss: nn.Module) -> None:
    with pytest.raises(LossError, match=type(loss).__name__):
        losses.as_per_sample(loss)(torch.zeros(3, 1), torch.zeros(3))


def test_settings_that_a_loss_module_gets_later_count() -> None:
    outputs, targets = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    module = nn.CrossEntropyLoss()
    loss = losses.as_per_sample(module)
    module.label_smoothing = 0.3
    expected = nn.functional.cross_entropy(outputs, targets, label_smoothing=0.3, reduction="none")
    torch.testing.assert_close(loss(outputs, targets), expected)
    assert module.reduction == "mean"


def test_other_callables_are_used_as_they_are() -> None:
    class OwnLoss(nn.Module):
        reduction = "mean"

        def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
            return (outputs - targets).square().sum(1)

    own = OwnLoss()
    assert losses.as_per_sample(own) is own
    assert losses.as_per_sample(losses.gaussian) is losses.gaussian


def test_what_cannot_be_called_is_refused() -> None:
    with pytest.raises(LossError, match=r"'mse'.*one loss per sample"):
        losses.as_per_sample("mse")  # type: ignore[arg-type]
    with pytest.raises(LossError, match=r"the class CrossEntropyLoss itself: pass one of its instances"):
        losses.as_per_sample(nn.CrossEntropyLoss)


def test_training_steps_are_no_losses() -> None:
    class Lightning(nn.Module):
        def training_step(self, batch: Any, index: int) -> Tensor:
            raise AssertionError

    with pytest.raises(LossError, match=r"training_step, which takes a batch.*sampled_params\(train=True\)"):
        losses.as_per_sample(Lightning().training_step)


# What a loss may be.


def test_check_losses_returns_a_good_loss() -> None:
    vector = torch.tensor([1.0, 2.0], requires_grad=True)
    assert losses.require_losses(vector, 2) is vector


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.tensor(1.0), r"scalar.*reduction='none'"),
        (torch.ones(2, 1), r"a column, shape \(2, 1\).*squeeze\(1\)"),
        (torch.ones(2, 2), r"each output with each target"),
        (torch.ones(2, 3), r"shape \(2, 3\).*2 samples.*shape \(2,\)"),
        (torch.ones(3), r"shape \(3,\).*2 samples"),
        (torch.ones(2, dtype=torch.long), r"torch.int64"),
        (torch.ones(2, dtype=torch.complex64), r"torch.complex64"),
        (1.0, r"returned float"),
        (None, r"returned NoneType"),
    ],
)
def test_check_losses_refuses(value: Any, message: str) -> None:
    with pytest.raises(LossError, match=f"(?s){message}"):
        losses.require_losses(value, 2)


def test_scalars_are_told_apart() -> None:
    outputs = normal(0, 4, 3).requires_grad_()
    targets, ignoring = torch.tensor([0, 1, 2, 1]), torch.tensor([0, -100, 2, 1])
    nobody, classes, ignored = (
        "which does not say what it was divided by",
        "by the class weights",
        r"not ignored \(ignore_index\)",
    )
    cross_entropy = nn.functional.cross_entropy
    for loss, reason in (
        (cross_entropy(outputs, targets), nobody),
        (cross_entropy(outputs, targets, weight=_CLASS_WEIGHTS), classes),
        (cross_entropy(outputs, ignoring, weight=_CLASS_WEIGHTS), classes),
        (cross_entropy(outputs, ignoring), ignored),
        (2 * cross_entropy(outputs, ignoring), ignored),
        (cross_entropy(outputs, ignoring, reduction="sum"), nobody),
        (cross_entropy(outputs, targets, weight=_CLASS_WEIGHTS, reduction="none").mean(), nobody),
        (outputs.square().mean(), nobody),
        (torch.tensor(1.0), nobody),
    ):
        with pytest.raises(LossError, match=rf"a scalar, .*{reason}.*reduction='none'"):
            losses.require_losses(loss, 4)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_check_losses_names_the_first_sample_that_is_not_finite(bad: float) -> None:
    with pytest.raises(NonFiniteLossError, match=rf"loss of sample 1 is {bad} \(2 of 4") as raised:
        losses.require_losses(torch.tensor([0.0, bad, 1.0, bad]), 4)
    assert isinstance(raised.value, PersampleError)
    assert isinstance(raised.value, ValueError)
