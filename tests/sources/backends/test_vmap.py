"""The `vmap` backend: chunks, random numbers, and what `torch.func` cannot run."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import persample
from persample import losses
from persample.errors import LossError, NonFiniteLossError, OptionError, UnsupportedModelError
from persample.testing.devices import generator_of


def mlp(*middle: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), *middle, nn.Linear(4, 2)).double()


def batch(size: int = 5) -> tuple[Tensor, Tensor]:
    generator = generator_of(1)
    return torch.randn(size, 3, generator=generator).double(), torch.arange(size) % 2


# Chunks.


@given(size=st.integers(1, 9), chunk_size=st.none() | st.integers(1, 10))
def test_chunks_change_nothing(size: int, chunk_size: int | None) -> None:
    model, (inputs, targets) = mlp(), batch(size)
    chunked = persample.make_source("vmap", model, losses.cross_entropy, chunk_size=chunk_size)
    loop = persample.make_source("loop", model, losses.cross_entropy)
    close = {"rtol": 1e-11, "atol": 1e-14}
    torch.testing.assert_close(chunked.per_sample(inputs, targets), loop.per_sample(inputs, targets), **close)
    moments, expected = chunked.moments(inputs, targets), loop.moments(inputs, targets)
    torch.testing.assert_close(moments.losses, expected.losses, **close)
    torch.testing.assert_close(moments.mean, expected.mean, **close)
    torch.testing.assert_close(moments.second_moment, expected.second_moment, **close)


_PEAK_MEMORY = """
import resource, sys, torch, persample
from persample.testing.devices import generator_of
model = torch.nn.Linear(500, 500, bias=False)
options = {"chunk_size": int(sys.argv[1]), "check": "never"}
source = persample.make_source("vmap", model, persample.losses.cross_entropy, **options)
inputs, targets = torch.randn(1000, 500), torch.zeros(1000, dtype=torch.long)
source.moments(inputs[:2], targets[:2])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
source.moments(inputs, targets)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux only")
def test_memory_is_that_of_a_chunk() -> None:
    """All gradients together are 1,000 × 250,000 numbers, about 1 GB; those of ten samples are 10 MB."""

    def peak(chunk_size: int) -> int:
        run = subprocess.run(
            [sys.executable, "-c", _PEAK_MEMORY, str(chunk_size)], capture_output=True, text=True, check=True
        )
        return int(run.stdout)

    assert peak(10) < 200_000


@pytest.mark.parametrize("chunk_size", [0, -1, 2.5, "all", True])
def test_chunk_sizes_that_are_refused(chunk_size: Any) -> None:
    with pytest.raises(OptionError, match=r"chunk_size=.*positive integer"):
        persample.make_source("vmap", mlp(), losses.cross_entropy, chunk_size=chunk_size)


# Random numbers.


def visible_masks() -> nn.Module:
    """A model whose gradient is its dropout mask: the output is w · dropout(x), and x is 1."""
    return nn.Sequential(nn.Dropout(0.5), nn.Linear(40, 1, bias=False)).double()


def outputs_as_losses(outputs: Tensor, targets: None) -> Tensor:
    return outputs.flatten()


def masks(size: int, **options: Any) -> Tensor:
    source = persample.make_source("vmap", visible_masks(), outputs_as_losses, **options)
    return source.per_sample(torch.ones(size, 40).double(), None)["1.weight"].squeeze(1)


def test_random_numbers_are_refused_by_default() -> None:
    source = persample.make_source("vmap", mlp(nn.Dropout()), losses.cross_entropy)
    with pytest.raises(UnsupportedModelError, match=r"Dropout '2'.*randomness='different'.*eval\(\)") as refusal:
        source.moments(*batch())
    assert isinstance(refusal.value.__cause__, RuntimeError)


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_different_draws_for_every_sample(chunk_size: int | None) -> None:
    torch.manual_seed(0)
    rows = masks(6, randomness="different", chunk_size=chunk_size)
    assert set(rows.unique().tolist()) == {0.0, 2.0}
    assert len(rows.unique(dim=0)) == 6


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_same_draws_once(chunk_size: int | None) -> None:
    torch.manual_seed(0)
    rows = masks(6, randomness="same", chunk_size=chunk_size)
    assert set(rows.unique().tolist()) == {0.0, 2.0}
    assert len(rows.unique(dim=0)) == 1


@pytest.mark.parametrize("randomness", ["different", "same"])
def test_the_losses_belong_to_the_same_draws(randomness: str) -> None:
    model = visible_masks()
    source = persample.make_source("vmap", model, outputs_as_losses, randomness=randomness)
    inputs = torch.ones(6, 40).double()
    torch.manual_seed(0)
    moments = source.moments(inputs, None)
    torch.manual_seed(0)
    rows = source.per_sample(inputs, None)["1.weight"].squeeze(1)
    torch.testing.assert_close(moments.losses, rows @ model[1].weight.detach().squeeze(0))
    torch.testing.assert_close(moments.second_moment["1.weight"].squeeze(0), rows.square().mean(0))


def test_draws_are_repeatable_from_a_seed_and_go_on() -> None:
    torch.manual_seed(0)
    first, second = masks(6, randomness="different"), masks(6, randomness="different")
    torch.manual_seed(0)
    assert torch.equal(masks(6, randomness="different"), first)
    assert not torch.equal(first, second)


def test_same_goes_on_drawing_in_the_next_call() -> None:
    torch.manual_seed(0)
    first, second = (masks(6, randomness="same", chunk_size=2) for _ in range(2))
    assert not torch.equal(first, second)


class _WholeSamples(nn.Module):
    """Leaves out whole samples, as stochastic depth does: draws into a tensor of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.empty(len(x), 1, dtype=x.dtype).bernoulli_(0.5)


def test_draws_in_place_are_refused_with_a_way_out() -> None:
    model = mlp(_WholeSamples())
    with pytest.raises(UnsupportedModelError, match=r"_WholeSamples '2'.*Choose randomness='same', or use .*'fused'"):
        persample.make_source("vmap", model, losses.cross_entropy, randomness="different").moments(*batch())
    torch.manual_seed(0)
    persample.make_source("vmap", model, losses.cross_entropy, randomness="same").moments(*batch())


def test_randomness_that_is_refused() -> None:
    with pytest.raises(OptionError, match=r"randomness='some'.*'error', 'different', 'same'"):
        persample.make_source("vmap", mlp(), losses.cross_entropy, randomness="some")


# What torch.func cannot run.


class Applied(nn.Module):
    """A function as a layer, with a buffer."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function
        self.register_buffer("mean", torch.zeros(4).double())

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.function(self, x)
        return output


def _moving_average(layer: Applied, x: Tensor) -> Tensor:
    layer.mean.mul_(0.9).add_(0.1 * x.detach().mean(0))
    return x - 0 * layer.mean


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda layer, x: x * (x.sum().item() > 0), "item"),
        (lambda layer, x: x if (x > -1e9).all() else -x, "control flow"),
        (lambda layer, x: x * torch.tensor(x.tolist()), "storage"),
        (lambda layer, x: x.masked_scatter(x > 0, x[x > 0]), "dynamic shape"),
        (_moving_average, "shared by all samples.*in place"),
    ],
    ids=["item", "control flow", "list", "mask", "buffer"],
)
@pytest.mark.parametrize("method", ["moments", "per_sample"])
def test_refusals_name_the_module_and_the_reason(method: str, function: Any, reason: str, no_trace: Any) -> None:
    model, (inputs, targets) = mlp(Applied(function)), batch()
    source = persample.make_source("vmap", model, losses.cross_entropy)
    with (
        pytest.raises(UnsupportedModelError, match=f"(?s)Applied '2'.*{reason}.*'vjp'") as refusal,
        no_trace(model, inputs, targets),
    ):
        getattr(source, method)(inputs, targets)
    assert isinstance(refusal.value.__cause__, RuntimeError)


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_recurrent_layers_are_right_or_refused_by_name(kind: type[nn.Module], per_sample_truth: Any) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cells = kind(3, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.cells(x)[0][:, -1]
            return output

    model, inputs, targets = Net().double(), torch.randn(4, 5, 3).double(), torch.arange(4) % 2
    try:
        gradients = persample.make_source("vmap", model, losses.cross_entropy).per_sample(inputs, targets)
    except UnsupportedModelError as refusal:
        assert f"{kind.__name__} 'cells'" in str(refusal)  # noqa: PT017
    else:
        torch.testing.assert_close(gradients, per_sample_truth(model, losses.cross_entropy, inputs, targets).gradients)


def test_parameters_in_a_list_are_refused_by_name() -> None:
    class Lists(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 2)
            self.weights = [self.inner.weight]

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weights[0].mT + self.inner.bias

    source = persample.make_source("vmap", Lists().double(), losses.cross_entropy, check="never")
    with pytest.raises(UnsupportedModelError, match=r"Parameter 'inner.weight' is used through a reference"):
        source.moments(*batch())


# What it can run.


def test_losses_that_read_the_parameters(per_sample_truth: Any) -> None:
    """A loss with weight decay, written as a closure over the model and as a module that holds a layer of it."""
    model, (inputs, targets) = mlp(), batch()

    class Decayed(nn.Module):
        def __init__(self, layer: nn.Linear) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
            return losses.cross_entropy(outputs, targets) + self.layer.weight.square().sum()

    def decayed(outputs: Tensor, targets: Tensor) -> Tensor:
        return losses.cross_entropy(outputs, targets) + model[2].weight.square().sum()

    extra = 2 * model[2].weight.detach()
    plain = per_sample_truth(model, losses.cross_entropy, inputs, targets).gradients
    for loss_fn in (decayed, Decayed(model[2])):
        found = persample.make_source("vmap", model, loss_fn).per_sample(inputs, targets)
        torch.testing.assert_close(found, plain | {"2.weight": plain["2.weight"] + extra})


def test_losses_with_a_parameter_of_their_own() -> None:
    """A learned temperature is no parameter of the model: nothing of it may stick to the result."""
    temperature = torch.tensor(2.0).double().requires_grad_()
    model, (inputs, targets) = mlp(), batch()
    source = persample.make_source("vmap", model, lambda o, t: losses.cross_entropy(o / temperature, t))
    moments = source.moments(inputs, targets)
    assert temperature.grad is None
    assert not moments.losses.requires_grad
    assert not any(value.requires_grad for value in (*moments.mean.values(), *moments.second_moment.values()))


def test_buffers_that_two_modules_share_change_as_in_one_forward_pass() -> None:
    class Counter(nn.Module):
        def __init__(self, count: Tensor) -> None:
            super().__init__()
            self.register_buffer("count", count)

        def forward(self, x: Tensor) -> Tensor:
            self.count += 1
            return x * self.count.clone()

    count = torch.zeros((), dtype=torch.float64)
    model, (inputs, targets) = mlp(Counter(count), Counter(count)), batch()
    found = persample.make_source("vmap", model, losses.cross_entropy).moments(inputs, targets)
    assert count == 2
    # The second module sees what the first one counted.
    scaled = mlp(Applied(lambda layer, x: 2 * x))
    expected = persample.make_source("loop", scaled, losses.cross_entropy).moments(inputs, targets)
    torch.testing.assert_close(found.losses, expected.losses)


# Losses.


def test_scalar_losses_are_refused_in_the_shapes_of_the_batch() -> None:
    source = persample.make_source("vmap", mlp(), lambda outputs, targets: outputs.sum())
    with pytest.raises(LossError, match=r"scalar.*shape \(5,\)"):
        source.moments(*batch())


def test_losses_that_are_a_vector_only_for_several_samples_are_refused() -> None:
    source = persample.make_source("vmap", mlp(), lambda outputs, targets: outputs.sum(1).squeeze())
    with pytest.raises(LossError, match=r"scalar.*shape \(1,\)"):
        source.moments(*batch())


def test_losses_that_are_not_finite_are_named_by_their_place_in_the_batch() -> None:
    inputs, targets = batch(7)
    inputs[5] = float("inf")
    inputs[6] = float("nan")
    source = persample.make_source("vmap", nn.Linear(3, 2).double(), losses.cross_entropy, chunk_size=2)
    with pytest.raises(NonFiniteLossError, match=r"sample 5 is nan \(2 of 7"):
        source.moments(inputs, targets)
