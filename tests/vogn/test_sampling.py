"""Draws are from the posterior, and the mean is back afterwards, bit for bit, whatever happens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from persample.errors import BatchError, LossError, OptionError, UsageError
from persample.losses import cross_entropy
from persample.testing.devices import generator_of, on_cuda
from persample.vogn import VOGN

Same = Callable[[list[Tensor], list[Tensor]], bool]
MeanOf = Callable[[nn.Module], list[Tensor]]
Train = Callable[..., None]
Batch = tuple[Tensor, Tensor]


def test_draws_have_the_mean_and_the_scale_of_the_posterior(model: nn.Module, vogn: VOGN, train: Train) -> None:
    train(vogn)
    weight = model[0].weight
    draws = []
    for _ in range(4000):
        with vogn.sampled_params():
            draws.append(weight.detach().clone())
    sigma = 1 / torch.sqrt(100 * vogn.state[weight]["curvature"] + 1.0)
    standard = (torch.stack(draws) - weight.detach()) / sigma
    assert standard.mean(0).abs().max() < 5 / 4000**0.5
    assert (standard.var(0) - 1).abs().max() < 5 * (2 / 4000) ** 0.5


def test_the_weights_are_the_mean_plus_sigma_times_the_generators_noise(
    model: nn.Module, make_vogn: Callable[..., VOGN]
) -> None:
    vogn = make_vogn(model, hess_init=0.24, prior_precision=1.0, generator=None)
    sizes = [p.numel() for p in model.parameters()]
    noise = torch.randn(sum(sizes), generator=generator_of(5), dtype=torch.float64).split(sizes)
    expected = [p.detach() + e.view(p.shape) / 5.0 for p, e in zip(model.parameters(), noise, strict=True)]
    with vogn.sampled_params(generator=generator_of(5)):
        for p, w in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(p.detach(), w, rtol=1e-14, atol=1e-14)


@pytest.mark.skipif(not on_cuda(), reason="needs a GPU (PERSAMPLE_TEST_DEVICE=cuda)")
def test_a_generator_of_the_cpu_gives_a_gpu_the_noise_of_a_cpu(
    model: nn.Module, make_vogn: Callable[..., VOGN]
) -> None:
    sizes = [p.numel() for p in model.parameters()]
    vogn = make_vogn(model, hess_init=0.24, prior_precision=1.0, generator=torch.Generator("cpu").manual_seed(5))
    noise = torch.randn(sum(sizes), generator=torch.Generator("cpu").manual_seed(5), dtype=torch.float64, device="cpu")
    mean = [p.detach().clone() for p in model.parameters()]
    with vogn.sampled_params():
        for p, m, e in zip(model.parameters(), mean, noise.split(sizes), strict=True):
            assert p.is_cuda
            torch.testing.assert_close(p.detach(), m + e.view(p.shape).to(p.device) / 5.0, rtol=1e-14, atol=1e-14)


def test_parameters_of_several_dtypes_and_empty_ones_are_drawn(make_vogn: Callable[..., VOGN]) -> None:
    double = torch.zeros(4, dtype=torch.float64)
    model = nn.ParameterList([torch.zeros(2, 3), double, torch.zeros(0, 5), torch.zeros(7)])
    vogn = make_vogn(model, hess_init=0.24, prior_precision=1.0)
    single = generator_of(2)
    vectors = torch.randn(13, generator=single).split([6, 7])
    noise = torch.randn(4, generator=single, dtype=torch.float64)
    with vogn.sampled_params():
        torch.testing.assert_close(model[0].detach(), vectors[0].view(2, 3) / 5)
        torch.testing.assert_close(model[1].detach(), noise / 5)
        torch.testing.assert_close(model[3].detach(), vectors[1] / 5)


def test_without_a_generator_the_global_seed_decides(
    model: nn.Module, make_vogn: Callable[..., VOGN], batch: Batch
) -> None:
    vogn = make_vogn(model, generator=None)
    torch.manual_seed(3)
    first = vogn.predict(batch[0], samples=2).probabilities
    torch.manual_seed(3)
    assert torch.equal(vogn.predict(batch[0], samples=2).probabilities, first)
    assert not torch.equal(vogn.predict(batch[0], samples=2).probabilities, first)


class TestTheMeanIsBack:
    """After success and after every kind of failure."""

    def test_after_sampled_params(self, model: nn.Module, vogn: VOGN, mean_of: MeanOf, same: Same) -> None:
        before, storages = mean_of(model), [p.data_ptr() for p in model.parameters()]
        with vogn.sampled_params():
            assert not same(mean_of(model), before)
        assert same(mean_of(model), before)
        assert [p.data_ptr() for p in model.parameters()] == storages

    def test_with_not_a_number_minus_zero_and_infinity(
        self, model: nn.Module, vogn: VOGN, mean_of: MeanOf, same: Same
    ) -> None:
        with torch.no_grad():
            model[0].bias.copy_(torch.tensor([float("nan"), -0.0, float("inf"), 5e-324]))
        before = [p.view(torch.int64) for p in mean_of(model)]
        with vogn.sampled_params():
            pass
        assert same([p.view(torch.int64) for p in mean_of(model)], before)

    def test_after_an_exception_and_changed_weights(
        self, model: nn.Module, vogn: VOGN, mean_of: MeanOf, same: Same
    ) -> None:
        def interrupted() -> None:
            with vogn.sampled_params(), torch.no_grad():
                model[0].weight.zero_()
                raise KeyboardInterrupt

        before = mean_of(model)
        with pytest.raises(KeyboardInterrupt):
            interrupted()
        assert same(mean_of(model), before)
        with vogn.sampled_params():
            pass  # a failed block does not stay open

    def test_after_observe(
        self, model: nn.Module, vogn: VOGN, batch: Batch, train: Train, mean_of: MeanOf, same: Same
    ) -> None:
        train(vogn)
        before = mean_of(model)
        vogn.observe(*batch)
        assert same(mean_of(model), before)

    @pytest.mark.parametrize("fails", ["forward", "backward", "loss", "source"])
    def test_after_observe_failed(
        self, fails: str, model: nn.Module, batch: Batch, train: Train, mean_of: MeanOf, same: Same
    ) -> None:
        broken = False

        def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
            if broken and fails == "loss":
                raise ZeroDivisionError
            losses = cross_entropy(outputs, targets)
            return losses.mean() if broken and fails == "source" else losses

        def on_forward(module: nn.Module, args: Any, output: Tensor) -> None:
            if broken and fails == "forward":
                raise ZeroDivisionError
            if broken and fails == "backward" and output.requires_grad:
                output.register_hook(lambda gradient: 1 / 0)

        vogn = VOGN(model, loss_fn, data_size=100, backend="loop", mc_samples=2)
        train(vogn)
        vogn.observe(*batch)
        model[0].register_forward_hook(on_forward)
        before, waiting = mean_of(model), vogn.state_dict()["observations"]["parts"][0]
        broken = True
        with pytest.raises(LossError if fails == "source" else ZeroDivisionError):
            vogn.observe(*batch)
        assert same(mean_of(model), before)
        after = vogn.state_dict()["observations"]["parts"][0]
        assert torch.equal(after["losses"], waiting["losses"])
        assert same(list(after["mean"].values()), list(waiting["mean"].values()))
        broken = False
        vogn.step()

    def test_after_predict_failed(
        self, model: nn.Module, vogn: VOGN, mean_of: MeanOf, same: Same, batch: Batch
    ) -> None:
        before = mean_of(model)
        with pytest.raises(RuntimeError, match="shapes"):
            vogn.predict(torch.zeros(2, 7, dtype=torch.float64))
        with pytest.raises(BatchError):
            vogn.predict([batch[0]])
        assert same(mean_of(model), before)
        vogn.predict(batch[0], samples=1)


class TestNestedUse:
    @pytest.mark.parametrize(
        "call",
        [
            lambda vogn, x, y: vogn.observe(x, y),
            lambda vogn, x, y: vogn.step(),
            lambda vogn, x, y: vogn.predict(x),
            lambda vogn, x, y: vogn.sampled_params().__enter__(),
            lambda vogn, x, y: vogn.state_dict(),
            lambda vogn, x, y: vogn.load_state_dict({}),
            lambda vogn, x, y: vogn.__getstate__(),
        ],
        ids=["observe", "step", "predict", "sampled_params", "state_dict", "load_state_dict", "copy"],
    )
    def test_is_refused_and_the_outer_block_goes_on(
        self,
        call: Callable[..., Any],
        model: nn.Module,
        vogn: VOGN,
        batch: Batch,
        train: Train,
        mean_of: MeanOf,
        same: Same,
    ) -> None:
        train(vogn)
        vogn.observe(*batch)
        before = mean_of(model)
        with vogn.sampled_params():
            drawn = mean_of(model)
            with pytest.raises(UsageError, match="inside"):
                call(vogn, *batch)
            assert same(mean_of(model), drawn)
        assert same(mean_of(model), before)
        vogn.step()


class TestPredict:
    def test_averages_the_probabilities_of_draws(self, model: nn.Module, vogn: VOGN, batch: Batch) -> None:
        generator, again = (generator_of(7) for _ in range(2))
        predicted = vogn.predict(batch[0], samples=5, generator=generator).probabilities
        each = []
        for _ in range(5):
            with vogn.sampled_params(generator=again), torch.no_grad():
                each.append(model(batch[0]).softmax(1))
        torch.testing.assert_close(predicted, torch.stack(each).mean(0), rtol=1e-12, atol=0)
        assert not predicted.requires_grad

    def test_takes_tuples_and_dicts_and_keeps_the_mode(self, vogn: VOGN, model: nn.Module, batch: Batch) -> None:
        predictions = [
            vogn.predict(inputs, samples=2, generator=generator_of(1)).probabilities
            for inputs in (batch[0], (batch[0],), {"input": batch[0]})
        ]
        assert torch.equal(predictions[0], predictions[1])
        assert torch.equal(predictions[0], predictions[2])
        assert model.training

    def test_works_in_inference_mode(self, vogn: VOGN, model: nn.Module, batch: Batch, train: Train) -> None:
        with torch.inference_mode():
            assert vogn.predict(batch[0] + 0, samples=2).probabilities.shape == (6, 2)
            with vogn.sampled_params():
                model(batch[0])
        assert not vogn.state[model[0].weight]["curvature"].is_inference()
        train(vogn)

    def test_gives_float32_for_half_precision(self, make_vogn: Callable[..., VOGN], batch: Batch) -> None:
        vogn = make_vogn(nn.Linear(3, 2).bfloat16())
        predicted = vogn.predict(batch[0].bfloat16(), samples=3).probabilities
        assert predicted.dtype == torch.float32
        torch.testing.assert_close(predicted.sum(1), torch.ones(6))

    @pytest.mark.parametrize("samples", [0, -1, 1.5])
    def test_refuses_less_than_one_draw(self, vogn: VOGN, batch: Batch, samples: Any) -> None:
        with pytest.raises(OptionError, match="samples="):
            vogn.predict(batch[0], samples=samples)

    def test_refuses_outputs_that_are_no_logits(self, make_vogn: Callable[..., VOGN], batch: Batch) -> None:
        model = nn.Sequential(nn.Linear(3, 1), nn.Flatten(0)).double()
        with pytest.raises(UsageError, match=r"\(6,\)"):
            make_vogn(model).predict(batch[0])
