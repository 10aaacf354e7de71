"""Backends that run the model themselves record by doing the user's forward pass again: the same one, or an error."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import persample
from persample.errors import UnsupportedModelError, UsageError
from persample.sources.recording.repeating import gradients_by_the_loss
from persample.testing.devices import generator_of

from ..ways import RECORDING, Batch, by_closure, by_context, by_observing, make, network

REPLAYING = ["loop", "vmap"]


def recorded(optimizer: Any) -> dict[str, Tensor]:
    return dict(optimizer._pending.observations.parts[0].moments.second_moment)


class Coder(nn.Module):
    """Returns a code, and what is computed from it."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(3, 2), nn.Linear(2, 3)
        self.double()

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        code = self.encoder(x).tanh()
        return code, {"decoded": self.decoder(code), "again": code}


@pytest.mark.parametrize("backend", RECORDING)
def test_outputs_that_are_computed_from_others(backend: str, batch: Batch) -> None:
    """As of a variational autoencoder, whose loss has a part for the code and one for the reconstruction."""
    x, _ = batch

    def losses_of(outputs: Any, targets: Tensor) -> Tensor:
        code, others = outputs
        return (others["decoded"] - targets).square().sum(1) + code.exp().sum(1) + others["again"].pow(3).sum(1)

    optimizer = make(backend=backend, model=Coder())
    with optimizer.sampled_params(train=True):
        losses_of(optimizer.model(x), x).mean().backward()
    with optimizer.sampled_params(generator=generator_of(2)):
        expected = persample.make_source("loop", optimizer.model, losses_of).moments(x, x)
    for name, second in recorded(optimizer).items():
        torch.testing.assert_close(second, expected.second_moment[name], rtol=1e-9, atol=1e-14)


def test_the_gradient_that_the_loss_gives_an_output_directly() -> None:
    x = torch.ones(2, 4, requires_grad=True)
    first, second = (x * 3).chunk(2, dim=1)  # two places of one node
    third = first * 5
    edges = {i: torch.autograd.graph.get_gradient_edge(t) for i, t in enumerate((first, second, third))}
    losses = (2 * first + 7 * third + second).sum(1)
    found = gradients_by_the_loss(losses, torch.tensor([1.0, 10.0]), edges)
    for index, due in {0: 2.0, 1: 1.0, 2: 7.0}.items():
        torch.testing.assert_close(found[index], torch.tensor([[due], [10 * due]]).expand(2, 2))
    losses.sum().backward()  # the graph is whole, and no hook is left
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.tensor([[111.0, 111.0, 3.0, 3.0]]).expand(2, 4))


class TestRandomNumbers:
    def test_are_those_of_the_users_pass(self, batch: Batch) -> None:
        found = {}
        for backend in ("fused", "loop"):
            torch.manual_seed(3)
            model = network()
            model.insert(1, nn.Dropout(0.5))
            optimizer = make(backend=backend, model=model)
            torch.manual_seed(4)
            by_context(optimizer, *batch)
            by_closure(optimizer, *batch)
            found[backend] = [*model.parameters(), *optimizer._precision(), torch.get_rng_state()]
        torch.testing.assert_close(found["loop"], found["fused"], rtol=1e-9, atol=1e-12)

    @pytest.mark.parametrize("randomness", ["different", "same"])
    def test_of_vmap_are_others(self, randomness: str, batch: Batch) -> None:
        model = network()
        model.insert(1, nn.Dropout(0.5))
        optimizer = make(backend="vmap", model=model, backend_options={"randomness": randomness})
        with pytest.raises(UnsupportedModelError, match=r"drew random numbers .*observe\(inputs, targets\)"):
            by_context(optimizer, *batch)
        by_observing(optimizer, *batch)
        model.eval()
        by_context(optimizer, *batch)

    def test_from_a_generator_of_the_models_own(self, batch: Batch) -> None:
        class Noisy(nn.Linear):
            generator = generator_of(0)

            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x + torch.randn(x.shape, generator=self.generator, dtype=x.dtype))

        optimizer = make(backend="loop", model=Noisy(3, 2).double())
        with pytest.raises(UnsupportedModelError):
            by_context(optimizer, *batch)


@pytest.mark.parametrize("check", ["first", "never"])
class TestWhatIsAnotherPassTheSecondTime:
    def test_a_model_that_keeps_something_where_nobody_looks(self, check: str, batch: Batch) -> None:
        class Growing(nn.Linear):
            memory = SimpleNamespace(calls=0)

            def forward(self, x: Tensor) -> Tensor:
                self.memory.calls += 1
                return super().forward(x * self.memory.calls)

        optimizer = make(backend="loop", model=Growing(3, 2).double(), backend_options={"check": check})
        with pytest.raises(UnsupportedModelError):
            by_context(optimizer, *batch)

    @pytest.mark.parametrize("backend", REPLAYING)
    def test_a_model_that_counts_its_passes(self, backend: str, check: str, batch: Batch) -> None:
        """The second pass of the backend counts as the first one did."""

        class Growing(nn.Module):
            def __init__(self, counting: bool) -> None:
                super().__init__()
                torch.manual_seed(0)
                self.net, self.calls, self.counting = network(), 0, counting

            def forward(self, x: Tensor) -> Tensor:
                self.calls += 1
                return self.net(x * (self.calls if self.counting else 1))

        found = []
        for counting in (True, False):
            optimizer = make(backend=backend, model=Growing(counting).double(), backend_options={"check": check})
            torch.manual_seed(1)
            by_context(optimizer, *batch)
            found.append([*optimizer.model.parameters()])
            assert optimizer.model.calls == 1
        torch.testing.assert_close(*found)

    @pytest.mark.parametrize("backend", REPLAYING)
    def test_inputs_that_were_changed(self, backend: str, check: str, batch: Batch) -> None:
        x, y = batch
        optimizer = make(backend=backend, backend_options={"check": check})
        changed = x.clone()

        def change() -> None:
            loss = F.cross_entropy(optimizer.model(changed), y)
            changed.data.mul_(2)  # unseen by autograd
            loss.backward()

        with (
            pytest.raises(UnsupportedModelError, match="inputs or model were changed"),
            optimizer.sampled_params(train=True),
        ):
            change()


@pytest.mark.parametrize("backend", REPLAYING)
class TestNothingElseChanges:
    def test_buffers(self, backend: str, batch: Batch) -> None:
        class Counting(nn.Linear):
            def __init__(self) -> None:
                super().__init__(3, 2)
                self.register_buffer("calls", torch.zeros(()))

            def forward(self, x: Tensor) -> Tensor:
                self.calls = self.calls + 1
                return super().forward(x * self.calls.detach())

        optimizer = make(backend=backend, model=Counting().double())
        for step in range(1, 4):
            by_context(optimizer, *batch)
            assert optimizer.model.calls == step


@pytest.mark.parametrize("backend", REPLAYING)
def test_hooks_on_parameters_are_refused(backend: str, batch: Batch) -> None:
    """In the user's backward pass they get the gradient of the batch, not those of its samples."""
    optimizer = make(backend=backend)
    optimizer.model[0].weight.register_hook(lambda gradient: gradient.clamp(-0.1, 0.1))
    with pytest.raises(UnsupportedModelError, match=r"'0.weight' has a hook .*observe\(inputs, targets\)"):
        by_context(optimizer, *batch)


@pytest.mark.parametrize("backend", REPLAYING)
def test_a_model_without_outputs_for_the_samples(backend: str, batch: Batch) -> None:
    class OnlyLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(self.net(x), y)

    optimizer = make(backend=backend, model=OnlyLoss())
    with (
        pytest.raises(UsageError, match=r"no tensor with the samples in dim 0.* 'fused'"),
        optimizer.sampled_params(train=True),
    ):
        optimizer.model(*batch).backward()


@pytest.mark.parametrize("backend", REPLAYING)
def test_tiny_and_huge_losses(backend: str, batch: Batch) -> None:
    """Squares of gradients in float32 must not vanish, nor checks that have an absolute scale."""
    x, y = batch
    found = {}
    for scale in (1.0, 1e-15, 1e15):
        optimizer = make(backend=backend)
        with optimizer.sampled_params(train=True):
            (scale * F.cross_entropy(optimizer.model(x), y)).backward()
        found[scale] = {name: second / scale**2 for name, second in recorded(optimizer).items()}
        torch.testing.assert_close(found[scale], found[1.0], rtol=1e-9, atol=1e-20)


@pytest.mark.parametrize("backend", REPLAYING)
def test_losses_that_are_not_finite_skip_the_step(backend: str, batch: Batch) -> None:
    x, y = batch
    optimizer = make(backend=backend)
    before = optimizer.model[0].weight.detach().clone()
    with optimizer.sampled_params(train=True):
        (F.cross_entropy(optimizer.model(x), y) * torch.inf).backward()
    with pytest.warns(UserWarning, match="skipped"):
        optimizer.step()
    assert optimizer.skipped_steps == 1
    assert torch.equal(optimizer.model[0].weight, before)


@pytest.mark.parametrize("backend", RECORDING)
def test_inputs_that_were_computed(backend: str, batch: Batch) -> None:
    """From parameters outside of the model, which get their gradient once."""
    x, y = batch
    scale = torch.ones(3, dtype=torch.float64, requires_grad=True)
    optimizer, plain = make(backend=backend), make(backend=backend)
    with optimizer.sampled_params(train=True):
        F.cross_entropy(optimizer.model(scale * x), y).backward()
    with plain.sampled_params(generator=generator_of(2)):
        loss = F.cross_entropy(plain.model(scale * x), y)
        torch.testing.assert_close(scale.grad, torch.autograd.grad(loss, scale)[0])
    by_observing(plain, x, y)
    optimizer.step()
    torch.testing.assert_close(optimizer.model[0].weight, plain.model[0].weight, rtol=1e-9, atol=1e-12)


class Pairs(nn.Module):
    """Returns two embeddings of each sample, and the similarities of all of them, as contrastive models do."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 4), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        left, right = self.left(x).tanh(), self.right(x.flip(1)).tanh()
        return {"similarities": left @ right.mT, "left": left, "right": right}


@pytest.mark.parametrize("backend", ["fused", "loop", "vmap", "hooks"])
def test_outputs_that_mix_the_samples_matter_only_to_losses_of_them(backend: str, per_sample_truth: Any) -> None:
    torch.manual_seed(0)
    model, x = Pairs().double(), torch.randn(5, 3).double()
    source = persample.make_source(backend, model, lambda o, t: (o["left"] * o["right"]).sum(1))
    truth = per_sample_truth(model, source.loss_fn, x, None).gradients
    for _ in range(2):
        with source.recording() as recorded:
            outputs = model(x)
            (outputs["left"] * outputs["right"]).sum(1).mean().backward()
        squares = {name: g.square().mean(0) for name, g in truth.items()}
        torch.testing.assert_close(dict(recorded.moments().second_moment), squares)
    with pytest.raises(UnsupportedModelError), source.recording():
        F.cross_entropy(model(x)["similarities"], torch.arange(5)).backward()
