"""Losses of the user's own: which are sums over the samples, and how they were reduced."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from persample.errors import UnsupportedModelError, UsageError
from persample.testing.devices import generator_of
from persample.vogn import LossReductionWarning

from ..ways import RECORDING, Batch, make


def contrastive(outputs: Tensor) -> Tensor:
    """Every sample is compared with all others."""
    embedded = F.normalize(outputs)
    return F.cross_entropy(embedded @ embedded.T, torch.arange(len(outputs)))


@pytest.mark.parametrize("backend", RECORDING)
class TestWhatIsNoSumOverTheSamples:
    @pytest.mark.parametrize(
        "loss",
        [
            lambda z, y: contrastive(z),
            lambda z, y: F.cross_entropy(z, y).sqrt(),
            lambda z, y: F.cross_entropy(z, y).exp(),
            lambda z, y: (losses := F.cross_entropy(z, y, reduction="none")).square().sum() / losses.sum(),
            lambda z, y: z.logsumexp(0).mean(),
            lambda z, y: z.pow(3).var(),
        ],
    )
    def test_losses_that_mix_the_samples(self, backend: str, loss: Any, batch: Batch) -> None:
        optimizer = make(backend=backend)
        with pytest.raises(UnsupportedModelError), optimizer.sampled_params(train=True):
            loss(optimizer.model(batch[0]), batch[1]).backward()

    @pytest.mark.parametrize(
        "loss",
        [
            lambda z, y: z[:, 0].mean(),
            lambda z, y: 0.5 * F.mse_loss(z, F.one_hot(y, 2).double()),
            lambda z, y: F.cross_entropy(z, y, label_smoothing=0.1) + 0.1 * z.square().mean(),
            lambda z, y: torch.stack([F.cross_entropy(z, y), z.abs().mean()]).sum(),
            lambda z, y: F.relu(z).sum(1).mean(),
            lambda z, y: F.cross_entropy(z.flip(1), y, reduction="none").sum() / len(y),
        ],
    )
    def test_losses_that_do_not(self, backend: str, loss: Any, batch: Batch) -> None:
        """Compared with a loop over the samples."""
        x, y = batch
        optimizer, generator = make(backend=backend), generator_of(2)
        with optimizer.sampled_params(train=True):
            loss(optimizer.model(x), y).backward()
        moments = optimizer._pending.observations.parts[0].moments
        params = list(optimizer.model.parameters())
        with optimizer.sampled_params(generator=generator):
            rows = [torch.autograd.grad(loss(optimizer.model(x[i : i + 1]), y[i : i + 1]), params) for i in range(6)]
        for name, column in zip(moments.mean, zip(*rows, strict=True), strict=True):
            torch.testing.assert_close(moments.mean[name], torch.stack(column).mean(0))
            torch.testing.assert_close(moments.second_moment[name], torch.stack(column).square().mean(0))

    def test_means_that_divide_by_weights(self, backend: str, batch: Batch) -> None:
        x, y = batch
        ignoring = torch.where(torch.arange(6) == 3, -100, y)
        weight = torch.tensor([1.0, 3.0], dtype=torch.float64)
        weighted, ignored = "some are weighted: .* the sum of the weights", "some are ignored, in some samples more"
        for loss, reason in (
            (lambda z: F.cross_entropy(z, y, weight=weight), weighted),
            (lambda z: F.cross_entropy(z, ignoring), ignored),
            (lambda z: F.cross_entropy(torch.stack([z, z], 2), torch.stack([y, ignoring], 1)) + z.mean(), ignored),
        ):
            optimizer = make(backend=backend)
            with pytest.raises(UsageError, match=reason), optimizer.sampled_params(train=True):
                loss(optimizer.model(x)).backward()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            summed = make(backend=backend)
            with summed.sampled_params(train=True, loss_reduction="sum"):
                F.cross_entropy(summed.model(x), ignoring, reduction="sum").backward()

    @pytest.mark.parametrize("flat", [False, True])
    def test_as_many_ignored_targets_in_every_sample(self, backend: str, flat: bool, batch: Batch) -> None:
        """As in models of language, where the last word has no next one: the mean divides by a constant."""
        x, y = batch
        words = torch.stack([y, 1 - y, torch.full_like(y, -100)], 1)

        def loss(z: Tensor, words: Tensor) -> Tensor:
            logits = torch.stack([z, 2 * z, 3 * z], 2)
            if not flat:
                return F.cross_entropy(logits, words)
            return F.cross_entropy(logits.transpose(1, 2).flatten(0, 1), words.flatten())

        optimizer = make(backend=backend)
        with optimizer.sampled_params(train=True):
            loss(optimizer.model(x), words).backward()
        params = list(optimizer.model.parameters())
        with optimizer.sampled_params(generator=generator_of(2)):
            rows = [torch.autograd.grad(loss(optimizer.model(x[[i]]), words[[i]]), params) for i in range(6)]
        second = optimizer._pending.observations.parts[0].moments.second_moment
        for found, column in zip(second.values(), zip(*rows, strict=True), strict=True):
            torch.testing.assert_close(found, torch.stack(column).square().mean(0))

    def test_division_by_the_number_of_parts_is_warned_of(self, backend: str, batch: Batch) -> None:
        x, y = batch
        for divide in (lambda loss: loss / 3, lambda loss: loss * (1 / 3)):
            optimizer = make(backend=backend)

            def accumulate(optimizer: Any = optimizer, divide: Any = divide) -> None:
                for part in (slice(0, 2), slice(2, 4), slice(4, 6)):
                    divide(F.cross_entropy(optimizer.model(x[part]), y[part])).backward()

            with pytest.warns(LossReductionWarning, match="divided by 3"), optimizer.sampled_params(train=True):
                accumulate()

    def test_accumulation_outside_is_warned_of(self, backend: str, batch: Batch) -> None:
        """As by trainers that run all batches but the last outside of `step(closure)`."""
        x, y = batch
        optimizer = make(backend=backend)
        (F.cross_entropy(optimizer.model(x), y) / 2).backward()
        with pytest.warns(LossReductionWarning, match="divided by 2"):
            optimizer.step(lambda: (F.cross_entropy(optimizer.model(x), y) / 2).backward())

    def test_losses_without_second_derivatives_are_taken(self, backend: str, batch: Batch) -> None:
        class Square(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, z: Tensor) -> Tensor:
                ctx.save_for_backward(z)
                return z.square()

            @staticmethod
            @torch.autograd.function.once_differentiable
            def backward(ctx: Any, delta: Tensor) -> Tensor:
                return 2 * ctx.saved_tensors[0] * delta

        optimizer = make(backend=backend)
        with optimizer.sampled_params(train=True):
            Square.apply(optimizer.model(batch[0])).sum(1).mean().backward()
