"""What VOGN does as an optimizer: observing, stepping, parameter groups, schedulers, frozen and unused parameters."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

from persample import losses, make_source
from persample.errors import OptionError, UnknownBackendError, UsageError
from persample.testing.devices import generator_of
from persample.vogn import (
    IVON,
    OGN,
    VOGN,
    MeanFieldVI,
    NonFiniteError,
    Prior,
    SkippedStepWarning,
    Vadam,
    VariationalOptimizer,
)

Same = Callable[[list[Tensor], list[Tensor]], bool]
MeanOf = Callable[[nn.Module], list[Tensor]]
Make = Callable[..., VOGN]
Train = Callable[..., None]
Batch = tuple[Tensor, Tensor]


class TestObserve:
    def test_returns_the_mean_loss_over_samples_and_draws(
        self, model: nn.Module, make_vogn: Make, batch: Batch
    ) -> None:
        vogn = make_vogn(model, mc_samples=3)
        loss = vogn.observe(*batch)
        again = generator_of(2)
        expected = []
        for _ in range(3):
            with vogn.sampled_params(generator=again), torch.no_grad():
                expected.append(losses.cross_entropy(model(batch[0]), batch[1]))
        torch.testing.assert_close(loss, torch.stack(expected).mean(), rtol=1e-12, atol=0)
        assert loss.shape == ()
        assert not loss.requires_grad

    def test_works_without_grad_mode_and_leaves_gradients_alone(
        self, model: nn.Module, vogn: VOGN, batch: Batch
    ) -> None:
        gradient = torch.ones_like(model[0].weight)
        model[0].weight.grad = gradient
        with torch.no_grad():
            vogn.observe(*batch)
            assert not torch.is_grad_enabled()
        vogn.step()
        assert model[0].weight.grad is gradient
        assert torch.equal(gradient, torch.ones_like(gradient))
        assert model[2].weight.grad is None

    def test_batches_count_by_their_sizes_and_draws_by_their_mean(
        self, model: nn.Module, make_vogn: Make, batch: Batch
    ) -> None:
        x, y = batch
        vogn = make_vogn(model, mc_samples=2)
        vogn.observe(x[:1], y[:1])
        vogn.observe(x[1:], y[1:])
        waiting = vogn.state_dict()["observations"]["parts"][0]

        source, again = (
            make_source("loop", model, losses.cross_entropy),
            generator_of(2),
        )
        rows: list[dict[str, Tensor]] = []
        for part in (slice(0, 1), slice(0, 1), slice(1, 6), slice(1, 6)):
            with vogn.sampled_params(generator=again):
                rows.append(source.per_sample(x[part], y[part]))
        assert len(waiting["losses"]) == 12
        for name in waiting["mean"]:
            gradients = torch.cat([part[name] for part in rows])
            torch.testing.assert_close(waiting["mean"][name], gradients.mean(0), rtol=1e-12, atol=1e-15)
            torch.testing.assert_close(
                waiting["second_moment"][name], gradients.square().mean(0), rtol=1e-12, atol=1e-15
            )


class TestAccumulation:
    """Uneven parts of a batch at the same draws are the batch."""

    @pytest.mark.parametrize("rule", [VOGN, OGN, IVON, Vadam, MeanFieldVI])
    @pytest.mark.parametrize("own_generator", [True, False])
    def test_is_exact(self, rule: type[VariationalOptimizer], own_generator: bool, batch: Batch) -> None:
        x, y = batch

        def train(parts: list[slice]) -> list[Tensor]:
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
            optimizer = rule(
                model,
                losses.cross_entropy,
                data_size=100,
                lr=0.01,
                mc_samples=3,
                generator=generator_of(2) if own_generator else None,
                **({"backend": "loop"} if issubclass(rule, VOGN) else {}),  # type: ignore[arg-type]
            )
            for _ in range(4):
                for part in parts:
                    optimizer.observe(x[part], y[part], redraw=False)
                optimizer.step()
            return [*(p.detach() for p in model.parameters()), *optimizer._precision(), torch.randn(2)]

        whole, parted = train([slice(0, 6)]), train([slice(0, 1), slice(1, 5), slice(5, 6)])
        for expected, actual in zip(whole, parted, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-7, atol=1e-10)

    def test_draws_anew_unless_told_otherwise(self, vogn: VOGN, batch: Batch) -> None:
        first = vogn.observe(*batch)
        again = vogn.observe(*batch, redraw=False)
        anew = vogn.observe(*batch)
        torch.testing.assert_close(again, first, rtol=1e-12, atol=0)
        assert abs(anew - first) > 1e-6
        torch.testing.assert_close(vogn.observe(*batch, redraw=False), anew, rtol=1e-12, atol=0)

    def test_a_step_begins_with_a_new_draw(self, make_vogn: Make, model: nn.Module, batch: Batch) -> None:
        vogn = make_vogn(model, lr=0.0, decay=1.0)
        first = vogn.observe(*batch, redraw=False)
        vogn.step()
        assert abs(vogn.observe(*batch, redraw=False) - first) > 1e-6

    def test_dropout_is_not_drawn_again(self, batch: Batch) -> None:
        """With the global generator, the noise is drawn again, but not what the model draws."""
        model = nn.Sequential(nn.Linear(3, 64), nn.Dropout(), nn.Linear(64, 2)).double()
        vogn = VOGN(model, losses.cross_entropy, data_size=100, hess_init=1e12, backend="loop")
        assert abs(vogn.observe(*batch) - vogn.observe(*batch, redraw=False)) > 1e-6

    def test_goes_on_after_loading(self, make_vogn: Make, model: nn.Module, batch: Batch) -> None:
        vogn, other = make_vogn(model), make_vogn(model)
        first = vogn.observe(*batch)
        other.load_state_dict(vogn.state_dict())
        torch.testing.assert_close(other.observe(*batch, redraw=False), first, rtol=1e-12, atol=0)

    def test_needs_as_many_draws_as_before(self, vogn: VOGN, batch: Batch) -> None:
        vogn.observe(*batch)
        vogn.mc_samples = 2
        with pytest.raises(UsageError, match=r"reuses the 1 draws.*mc_samples is now 2"):
            vogn.observe(*batch, redraw=False)


class TestPriors:
    def test_one_for_each_weight_is_found_by_name_and_group(self, make_vogn: Make, model: nn.Module) -> None:
        precision = {name: torch.rand_like(p) + 0.5 for name, p in model.named_parameters()}
        groups = [{"params": model[2].parameters()}, {"params": model[0].parameters(), "prior_precision": 7.0}]
        vogn = make_vogn(model, params=groups, hess_init=1e-30, prior_precision=precision)
        found = dict(zip(vogn._params(), vogn._precision(), strict=True))
        torch.testing.assert_close(found["2.weight"], precision["2.weight"].detach())
        torch.testing.assert_close(found["0.bias"], torch.full_like(found["0.bias"], 7.0))

    def test_an_object_with_mean_and_precision(self, make_vogn: Make, model: nn.Module, train: Train) -> None:
        """Far from the data, and sure: the posterior goes there."""

        precision = {name: torch.full_like(p, 1e6) for name, p in model.named_parameters()}
        prior = Prior({name: torch.full_like(value, 3.0) for name, value in precision.items()}, precision)
        vogn = make_vogn(model, prior=prior, lr=1.0)
        train(vogn)
        assert torch.equal(vogn.prior.mean["2.bias"], prior.mean["2.bias"])
        assert torch.equal(vogn.prior.precision["2.bias"], prior.precision["2.bias"])
        for p in model.parameters():
            torch.testing.assert_close(p.detach(), torch.full_like(p, 3.0), rtol=0, atol=1e-2)

    def test_are_copied_saved_and_loaded(self, make_vogn: Make, model: nn.Module, train: Train) -> None:
        prior_mean = {name: torch.full_like(p, 3.0) for name, p in model.named_parameters()}
        vogn = make_vogn(model, prior_mean=prior_mean)
        prior_mean["0.weight"].zero_()
        other = make_vogn(model)
        other.load_state_dict(vogn.state_dict())
        assert torch.equal(other.param_groups[0]["prior_mean"][0], torch.full_like(model[0].weight, 3.0))
        train(other)

    def test_must_fit(self, make_vogn: Make, model: nn.Module) -> None:
        fitting = {name: torch.ones_like(p) for name, p in model.named_parameters()}
        with pytest.raises(OptionError, match=r"prior_mean.*'2\.bias'.*lacks it"):
            make_vogn(model, prior_mean={name: t for name, t in fitting.items() if name != "2.bias"})
        with pytest.raises(OptionError, match=r"prior_precision.*'0\.bias'.*shape \(3,\)"):
            make_vogn(model, prior_precision=fitting | {"0.bias": torch.ones(3)})
        with pytest.raises(OptionError, match=r"prior_precision=\{…\} must be a finite number >= 0, or a tensor"):
            make_vogn(model, prior_precision=fitting | {"0.bias": -torch.ones(4)})


class TestStep:
    def test_needs_an_observation(self, vogn: VOGN, batch: Batch) -> None:
        with pytest.raises(UsageError, match="observe"):
            vogn.step()
        vogn.observe(*batch)
        vogn.step()
        with pytest.raises(UsageError, match="observe"):
            vogn.step()

    def test_refuses_a_closure_and_keeps_what_was_observed(self, vogn: VOGN, batch: Batch) -> None:
        vogn.observe(*batch)
        with pytest.raises(UsageError, match="the model was not called"):
            vogn.step(lambda: 0.0)  # type: ignore[arg-type]
        vogn.step()

    def test_zero_grad_forgets_what_was_observed(self, vogn: VOGN, model: nn.Module, batch: Batch) -> None:
        model[0].weight.grad = torch.ones_like(model[0].weight)
        vogn.observe(*batch)
        vogn.zero_grad()
        assert model[0].weight.grad is None
        with pytest.raises(UsageError):
            vogn.step()

    def test_changes_nothing_if_it_raises(
        self, model: nn.Module, make_vogn: Make, batch: Batch, train: Train, mean_of: MeanOf, same: Same
    ) -> None:
        """The last group fails, when the first one could have been updated already."""
        vogn = make_vogn(model, params=[{"params": model[0].parameters()}, {"params": model[2].parameters()}])
        train(vogn)
        vogn.observe(*batch)
        before, state = mean_of(model), [dict(vogn.state[p]) for p in model.parameters()]
        vogn.param_groups[1]["lr"] = -1.0
        with pytest.raises(OptionError, match="lr"):
            vogn.step()
        assert same(mean_of(model), before)
        for p, old in zip(model.parameters(), state, strict=True):
            assert vogn.state[p] == old
        vogn.param_groups[1]["lr"] = 0.05
        vogn.step()
        assert not same(mean_of(model), before)


class TestStepsThatAreSkipped:
    """A step that would make something infinite or not a number changes nothing; after five in a row it is an error."""

    @staticmethod
    def overflowing() -> VOGN:
        """With the loss w x the gradient is x: 1e25 is finite in float32, and so is the loss, but not 1e25 squared."""
        model = nn.Linear(1, 1, bias=False)
        options = {"check": "never"}
        return VOGN(model, lambda w, y: w.flatten(), data_size=10, backend="loop", backend_options=options)

    def test_the_curvature(self, mean_of: MeanOf, same: Same) -> None:
        vogn = self.overflowing()
        before = mean_of(vogn.model)
        vogn.observe(torch.ones(1, 1), None)
        vogn.observe(torch.full((1, 1), 1e25), None)
        with pytest.warns(SkippedStepWarning, match="'weight'") as caught:
            vogn.step()
        assert [warning.filename for warning in caught] == [__file__]
        assert same(mean_of(vogn.model), before)
        assert vogn.state[vogn.model.weight]["step"] == 0
        assert vogn.skipped_steps == 1
        with pytest.raises(UsageError, match="observe"):
            vogn.step()  # what was observed is forgotten

    def test_the_mean_of_one_group_stops_all(
        self, model: nn.Module, make_vogn: Make, batch: Batch, train: Train, mean_of: MeanOf, same: Same
    ) -> None:
        vogn = make_vogn(model, params=[{"params": model[0].parameters()}, {"params": model[2].parameters()}])
        train(vogn)
        vogn.observe(*batch)
        before, state = mean_of(model), [dict(vogn.state[p]) for p in model.parameters()]
        vogn.param_groups[1]["lr"] = 1e308
        vogn._pending.observations.gradient()["2.weight"].fill_(-1e300)
        with pytest.warns(SkippedStepWarning, match=r"'2\.weight'"):
            vogn.step()
        assert same(mean_of(model), before)
        for p, old in zip(model.parameters(), state, strict=True):
            assert vogn.state[p] == old

    def test_the_updated_mean_must_fit_into_half_precision(self, make_vogn: Make) -> None:
        model = nn.Linear(1, 2).half()
        with torch.no_grad():
            model.weight.fill_(60_000.0)
        vogn = make_vogn(model, lr=0.04, prior_precision=1e-9, hess_init=0.1)
        vogn.observe(torch.ones(1, 1).half(), torch.tensor([0]))
        vogn._pending.observations.gradient()["weight"].fill_(-1e6)
        with pytest.warns(SkippedStepWarning, match="'weight'"):
            vogn.step()
        assert model.weight.tolist() == [[60_000.0], [60_000.0]]

    def test_large_finite_numbers_whose_sum_overflows_are_no_reason(self, make_vogn: Make) -> None:
        model = nn.Linear(3, 2, bias=False)
        with torch.no_grad():
            model.weight.fill_(2e38)
        vogn = make_vogn(model, lr=0.0, backend_options={"check": "never"})
        vogn.observe(torch.zeros(1, 3), torch.tensor([0]))
        vogn.step()
        assert vogn.skipped_steps == 0

    def test_five_in_a_row_are_an_error_and_a_good_one_starts_anew(self) -> None:
        vogn = self.overflowing()

        def step(x: float) -> None:
            vogn.observe(torch.full((1, 1), x), None)
            vogn.step()

        for _ in range(2):
            for _ in range(4):
                with pytest.warns(SkippedStepWarning):
                    step(1e25)
            step(1e-3)
        for _ in range(4):
            with pytest.warns(SkippedStepWarning):
                step(1e25)
        with pytest.raises(NonFiniteError, match=r"step 5 in a row.*lower lr"):
            step(1e25)
        assert vogn.skipped_steps == 13

    def test_the_counts_are_saved(self) -> None:
        vogn, other = self.overflowing(), self.overflowing()
        for _ in range(4):
            vogn.observe(torch.full((1, 1), 1e25), None)
            with pytest.warns(SkippedStepWarning):
                vogn.step()
        other.load_state_dict(vogn.state_dict())
        assert other.skipped_steps == 4
        other.observe(torch.full((1, 1), 1e25), None)
        with pytest.raises(NonFiniteError):
            other.step()


class TestMomentum:
    def test_the_first_step_is_that_without_momentum(
        self, make_vogn: Make, batch: Batch, mean_of: MeanOf, train: Train
    ) -> None:
        means = []
        for momentum in (0.0, 0.9):
            torch.manual_seed(0)
            model = nn.Linear(3, 2).double()
            train(make_vogn(model, momentum=momentum), steps=1)
            means.append(mean_of(model))
        for without, with_momentum in zip(*means, strict=True):
            torch.testing.assert_close(with_momentum, without, rtol=1e-12, atol=1e-15)

    def test_can_be_switched_off_on_the_way(self, vogn: VOGN, model: nn.Module, train: Train) -> None:
        vogn.param_groups[0]["momentum"] = 0.9
        train(vogn)
        vogn.param_groups[0]["momentum"] = 0.0
        train(vogn, steps=1)
        assert vogn.state[model[0].weight]["momentum_mass"] == 1.0


class TestParameters:
    def test_groups_have_their_own_settings(
        self, make_vogn: Make, batch: Batch, mean_of: MeanOf, same: Same, train: Train
    ) -> None:
        """Each group moves as a whole model with its settings would from the same moments."""
        first = {"lr": 0.02, "prior_precision": 3.0, "decay": 0.7, "hess_init": 0.4, "order": "updated"}
        second = {"lr": 0.03, "decay": 0.8, "momentum": 0.5}

        def fresh() -> nn.Module:
            torch.manual_seed(0)
            return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()

        model = fresh()
        params = [{"params": list(model[0].parameters()), **first}, {"params": model[2].parameters(), **second}]
        grouped = make_vogn(model, params=params)
        wholes = [make_vogn(fresh(), **settings) for settings in (first, second)]
        for _ in range(3):
            grouped.observe(*batch)
            for whole in wholes:
                whole._pending.observations = grouped._pending.observations
                whole.step()
            grouped.step()
        for layer, whole in zip((0, 2), wholes, strict=True):
            assert same(mean_of(model[layer]), mean_of(whole.model[layer]))
            assert not same(mean_of(model[2 - layer]), mean_of(whole.model[2 - layer]))

    def test_groups_draw_with_their_own_scale(self, make_vogn: Make, model: nn.Module) -> None:
        params = [
            {"params": model[0].parameters(), "hess_init": 1e20},
            {"params": model[2].parameters(), "prior_precision": 1e20},
        ]
        vogn = make_vogn(model, params=params)
        mean = [p.detach().clone() for p in model.parameters()]
        with vogn.sampled_params():
            for p, mu in zip(model.parameters(), mean, strict=True):
                torch.testing.assert_close(p.detach(), mu, rtol=0, atol=1e-8)

    def test_those_outside_of_the_groups_are_neither_drawn_nor_updated(
        self, make_vogn: Make, model: nn.Module, batch: Batch, mean_of: MeanOf, same: Same
    ) -> None:
        vogn = make_vogn(model, params=model[0].parameters())
        before = mean_of(model[2])
        with vogn.sampled_params():
            assert same(mean_of(model[2]), before)
        vogn.observe(*batch)
        vogn.step()
        assert same(mean_of(model[2]), before)

    def test_frozen_ones_are_left_out(
        self, make_vogn: Make, model: nn.Module, batch: Batch, mean_of: MeanOf, same: Same, train: Train
    ) -> None:
        model[0].requires_grad_(False)
        before = mean_of(model)
        train(make_vogn(model))
        assert same(mean_of(model)[:2], before[:2])
        assert not same(mean_of(model)[2:], before[2:])

    def test_one_frozen_later_keeps_its_posterior(
        self, vogn: VOGN, model: nn.Module, mean_of: MeanOf, same: Same, train: Train
    ) -> None:
        train(vogn)
        model[0].requires_grad_(False)
        before, curvature = mean_of(model), vogn.state[model[0].weight]["curvature"]
        train(vogn)
        assert same(mean_of(model)[:2], before[:2])
        assert vogn.state[model[0].weight]["curvature"] is curvature
        with vogn.sampled_params():
            assert not torch.equal(model[0].weight, before[0])
        model.requires_grad_(False)
        with pytest.raises((UsageError, RuntimeError)):
            train(vogn)

    def test_one_thawed_later_is_added(self, make_vogn: Make, model: nn.Module, train: Train) -> None:
        model[0].requires_grad_(False)
        vogn = make_vogn(model)
        train(vogn)
        model[0].requires_grad_(True)
        vogn.add_param_group({"params": model[0].parameters(), "lr": 0.01})
        train(vogn)
        assert vogn.state[model[0].weight]["step"] == 3
        assert vogn.state[model[2].weight]["step"] == 6

    def test_an_unused_one_follows_the_prior(self, make_vogn: Make, batch: Batch, train: Train) -> None:
        """With g = 0: s_t = γ^t s_0 and μ shrinks by the factor 1 − α (λ/N) / (s_t + λ/N)."""
        model = nn.Linear(3, 2).double()
        model.extra = nn.Parameter(torch.ones(5, dtype=torch.float64))
        vogn = make_vogn(model, lr=0.05, decay=0.9, hess_init=0.5, prior_precision=20.0)
        train(vogn, steps=4)
        mean = 1.0
        for t in range(4):
            mean *= 1 - 0.05 * 0.2 / (0.5 * 0.9**t + 0.2)
        torch.testing.assert_close(model.extra.detach(), torch.full((5,), mean, dtype=torch.float64))
        torch.testing.assert_close(
            vogn.state[model.extra]["curvature"], torch.full((5,), 0.5 * 0.9**4, dtype=torch.float64)
        )

    def test_shared_ones_count_once(self, make_vogn: Make, batch: Batch, train: Train) -> None:
        model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double()
        model[2].weight = model[0].weight
        vogn = make_vogn(model)
        train(vogn)
        assert vogn.param_groups[0]["param_names"] == ["0.weight", "0.bias", "2.bias"]
        assert torch.equal(model[2].weight, model[0].weight)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_of_low_precision_have_their_curvature_in_float32(
        self, make_vogn: Make, batch: Batch, dtype: torch.dtype
    ) -> None:
        model = nn.Linear(3, 2).to(dtype)
        vogn = make_vogn(model, momentum=0.9, hess_init=0.5001)
        vogn.observe(batch[0].to(dtype), batch[1])
        assert torch.equal(vogn.state[model.weight]["curvature"], torch.full((2, 3), 0.5001))
        vogn.step()
        assert model.weight.dtype == dtype
        assert vogn.state[model.weight]["curvature"].dtype == torch.float32
        assert vogn.state[model.weight]["momentum_buffer"].dtype == torch.float32

    def test_the_model_may_be_cast_while_training(self, make_vogn: Make, batch: Batch, train: Train) -> None:
        model = nn.Linear(3, 2).double()
        vogn = make_vogn(
            model, momentum=0.9, prior_mean={name: torch.ones_like(p) for name, p in model.named_parameters()}
        )
        train(vogn)
        model.float()
        for _ in range(2):
            vogn.observe(batch[0].float(), batch[1])
            vogn.step()
        assert vogn.state[model.weight]["curvature"].dtype == torch.float32
        assert vogn.state[model.weight]["step"] == 5

    def test_the_model_may_be_cast_before_the_first_use(self, make_vogn: Make, batch: Batch, train: Train) -> None:
        model = nn.Linear(3, 2)
        vogn = make_vogn(model)
        model.double()
        train(vogn)
        assert vogn.state[model.weight]["curvature"].dtype == torch.float64


class TestSchedulers:
    @pytest.mark.parametrize(
        "make_scheduler",
        [
            lambda o: lr_scheduler.StepLR(o, step_size=2, gamma=0.1),
            lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=6),
            lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=8),
            lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
        ],
        ids=["step", "cosine", "one-cycle", "lambda"],
    )
    def test_set_the_learning_rate(
        self, make_scheduler: Callable[[VOGN], Any], model: nn.Module, make_vogn: Make, batch: Batch, mean_of: MeanOf
    ) -> None:
        """With curvature kept at its initial value and no prior, a step is exactly α ĝ / s_0."""
        vogn = make_vogn(model, prior_precision=0.0, decay=1.0, hess_init=0.5)
        scheduler = make_scheduler(vogn)
        rates = []
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(6):
                vogn.param_groups[0]["momentum"] = 0.0  # one-cycle moves it too
                vogn.observe(*batch)
                gradient, before = vogn.state_dict()["observations"]["parts"][0]["mean"]["0.weight"], mean_of(model)[0]
                rates.append(vogn.param_groups[0]["lr"])
                vogn.step()
                moved = before - model[0].weight.detach()
                if "momentum_buffer" not in vogn.state[model[0].weight]:
                    torch.testing.assert_close(moved, rates[-1] * gradient / 0.5, rtol=1e-9, atol=1e-15)
                scheduler.step()
        assert len(set(rates)) > 1

    def test_one_cycle_moves_the_momentum(self, vogn: VOGN, batch: Batch, train: Train) -> None:
        scheduler = lr_scheduler.OneCycleLR(vogn, max_lr=0.1, total_steps=8)
        momenta = []
        for _ in range(6):
            momenta.append(vogn.param_groups[0]["momentum"])
            train(vogn, steps=1)
            scheduler.step()
        assert max(momenta) == pytest.approx(0.95)
        assert min(momenta) < 0.9

    def test_on_plateaus(self, vogn: VOGN, train: Train) -> None:
        scheduler = lr_scheduler.ReduceLROnPlateau(vogn, patience=0, factor=0.5)
        for _ in range(3):
            train(vogn, steps=1)
            scheduler.step(1.0)
        assert vogn.param_groups[0]["lr"] == pytest.approx(0.05 / 4)

    def test_a_learning_rate_of_zero_leaves_the_mean(
        self, vogn: VOGN, model: nn.Module, train: Train, mean_of: MeanOf, same: Same
    ) -> None:
        vogn.param_groups[0]["lr"] = 0.0
        before = mean_of(model)
        train(vogn)
        assert same(mean_of(model), before)
        assert vogn.state[model[0].weight]["step"] == 3


def test_an_unknown_backend_is_refused(model: nn.Module) -> None:
    with pytest.raises(UnknownBackendError, match="no-such"):
        VOGN(model, losses.cross_entropy, data_size=10, backend="no-such")


def test_training_learns() -> None:
    """Logistic regression on two clearly separated classes."""
    generator = generator_of(0)
    y = torch.arange(64) % 2
    x = torch.randn(64, 2, generator=generator) + 3 * (2 * y[:, None] - 1)
    torch.manual_seed(0)
    vogn = VOGN(
        nn.Linear(2, 2), losses.cross_entropy, data_size=64, lr=0.1, hess_init=0.5, backend="loop", generator=generator
    )
    for _ in range(30):
        vogn.observe(x, y)
        vogn.step()
    probabilities = vogn.predict(x).probabilities
    assert (probabilities.argmax(1) == y).float().mean() > 0.95
    assert -probabilities[torch.arange(64), y].log().mean() < 0.3
