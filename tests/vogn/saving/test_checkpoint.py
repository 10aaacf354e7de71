"""Saved and loaded, copied and pickled, a run goes on bit for bit."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

from persample.errors import OptionError
from persample.losses import cross_entropy
from persample.testing.devices import generator_of
from persample.vogn import IVON, VOGN, MeanFieldVI, Vadam

Make = Callable[..., VOGN]
Train = Callable[..., None]
MeanOf = Callable[[nn.Module], list[Tensor]]
Same = Callable[[list[Tensor], list[Tensor]], bool]
Batch = tuple[Tensor, Tensor]


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def fresh(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(9)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)


@pytest.mark.parametrize("pending", [False, True], ids=["between steps", "with moments that wait"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("own_generator", [True, False], ids=["own generator", "global generator"])
def test_a_resumed_run_ends_where_the_uninterrupted_one_ends(
    pending: bool, dtype: torch.dtype, own_generator: bool, batch: Batch, make_vogn: Make, mean_of: MeanOf, same: Same
) -> None:
    x, y = batch[0].to(dtype), batch[1]

    def build() -> tuple[nn.Module, VOGN, Any]:
        model = fresh(dtype)
        generator = generator_of(2) if own_generator else None
        groups = [{"params": model[0].parameters(), "momentum": 0.9}, {"params": model[2].parameters(), "decay": 0.5}]
        vogn = make_vogn(model, params=groups, mc_samples=2, generator=generator)
        return model, vogn, lr_scheduler.StepLR(vogn, step_size=2, gamma=0.5)

    def go_on(vogn: VOGN, scheduler: Any, steps: int) -> None:
        for _ in range(steps):
            vogn.observe(x[:4], y[:4])
            vogn.observe(x[4:], y[4:])
            vogn.step()
            scheduler.step()

    model, vogn, scheduler = build()
    go_on(vogn, scheduler, 3)
    if pending:
        vogn.observe(x[:3], y[:3])
    saved = through_a_file(
        {
            "model": model.state_dict(),
            "vogn": vogn.state_dict(),
            "scheduler": scheduler.state_dict(),
            "global": torch.get_rng_state(),
        }
    )
    go_on(vogn, scheduler, 3)
    ended = mean_of(model), [vogn.state[p]["curvature"] for p in model.parameters()]

    model, vogn, scheduler = build()
    go_on(vogn, scheduler, 1)  # a run of its own, of which nothing may remain
    model.load_state_dict(saved["model"])
    vogn.load_state_dict(saved["vogn"])
    scheduler.load_state_dict(saved["scheduler"])
    torch.set_rng_state(saved["global"])
    go_on(vogn, scheduler, 3)
    assert same(mean_of(model), ended[0])
    assert same([vogn.state[p]["curvature"] for p in model.parameters()], ended[1])
    assert all(vogn.state[p]["step"] == 6 for p in model.parameters())


@pytest.mark.parametrize("rule", [IVON, Vadam, MeanFieldVI])
def test_the_siblings_resume_bit_for_bit(rule: Any, batch: Batch, mean_of: MeanOf, same: Same) -> None:
    def build() -> tuple[nn.Module, Any]:
        model = fresh(torch.float64)
        generator = generator_of(2)
        return model, rule(model, cross_entropy, data_size=100, mc_samples=2, lr=0.01, generator=generator)

    def go_on(optimizer: Any) -> None:
        for _ in range(3):
            optimizer.observe(*batch)
            optimizer.step()

    model, optimizer = build()
    go_on(optimizer)
    optimizer.observe(*batch)
    saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    go_on(optimizer)
    ended = mean_of(model), optimizer._precision()
    model, optimizer = build()
    go_on(optimizer)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    go_on(optimizer)
    assert same(mean_of(model), ended[0])
    assert same(optimizer._precision(), ended[1])


def test_a_state_dict_does_not_change_while_training_goes_on(vogn: VOGN, train: Train, batch: Batch) -> None:
    train(vogn)
    vogn.observe(*batch)
    state = vogn.state_dict()
    copied = copy.deepcopy(state)
    vogn.observe(*batch)
    train(vogn)
    assert torch.equal(state["state"][0]["curvature"], copied["state"][0]["curvature"])
    assert state["state"][0]["step"] == copied["state"][0]["step"]
    assert torch.equal(
        state["observations"]["parts"][0]["mean"]["0.weight"], copied["observations"]["parts"][0]["mean"]["0.weight"]
    )
    assert torch.equal(state["generator"]["state"], copied["generator"]["state"])


def test_two_optimizers_from_one_state_do_not_share_it(
    model: nn.Module, vogn: VOGN, make_vogn: Make, train: Train, mean_of: MeanOf, same: Same
) -> None:
    train(vogn)
    state, weights = vogn.state_dict(), model.state_dict()
    ends = []
    for _ in range(2):
        other = fresh(torch.float64)
        other.load_state_dict(weights)
        resumed = make_vogn(other)
        resumed.load_state_dict(state)
        train(resumed)
        ends.append(mean_of(other))
    assert same(*ends)


def test_the_state_before_the_first_step_can_be_loaded(
    vogn: VOGN, make_vogn: Make, train: Train, model: nn.Module
) -> None:
    other = make_vogn(copy.deepcopy(model))
    train(other)
    other.load_state_dict(through_a_file(vogn.state_dict()))
    assert not any(other.state.values())


def test_settings_and_counts_come_from_the_saved_run(model: nn.Module, vogn: VOGN, make_vogn: Make) -> None:
    other = make_vogn(model, data_size=7, mc_samples=3, lr=0.9, momentum=0.5, order="updated")
    other.load_state_dict(vogn.state_dict())
    assert (other.data_size, other.mc_samples) == (100, 1)
    for name in ("lr", "momentum", "order"):
        assert other.param_groups[0][name] == vogn.param_groups[0][name]


def test_parameters_correspond_by_position_whatever_their_names(
    model: nn.Module, vogn: VOGN, make_vogn: Make, train: Train
) -> None:
    """As in every PyTorch optimizer: a compiled or wrapped model has the same parameters under other names."""
    train(vogn)
    wrapped = nn.ModuleDict({"module": copy.deepcopy(model)})
    wrapped.forward = wrapped["module"].forward
    other = make_vogn(wrapped)
    other.load_state_dict(vogn.state_dict())
    assert torch.equal(other.state[wrapped["module"][0].weight]["curvature"], vogn.state[model[0].weight]["curvature"])
    train(other)
    assert other.state[wrapped["module"][0].weight]["step"] == 6


@pytest.mark.parametrize("rule", [VOGN, IVON, Vadam, MeanFieldVI])
def test_loaded_again_and_again_and_copied_it_takes_and_gives_the_same_states(rule: Any, batch: Batch) -> None:
    model = fresh(torch.float64)
    model[2].requires_grad_(False)
    optimizer = rule(model, cross_entropy, data_size=100)
    optimizer.observe(*batch)
    optimizer.step()
    state = optimizer.state_dict()
    for _ in range(2):
        optimizer.load_state_dict(state)
    model[2].requires_grad_(True)
    optimizer.add_param_group({"params": model[2].parameters()})
    copied = copy.deepcopy(optimizer)
    for one in (copied, optimizer):
        other_model = fresh(torch.float64)
        groups = [{"params": layer.parameters()} for layer in (other_model[0], other_model[2])]
        other = rule(other_model, cross_entropy, data_size=100, params=groups)
        other.load_state_dict(through_a_file(one.state_dict()))
        copied.load_state_dict(other.state_dict())


class TestGenerators:
    def test_one_is_made_if_the_optimizer_has_none(self, vogn: VOGN, make_vogn: Make, model: nn.Module) -> None:
        other = make_vogn(model, generator=None)
        other.load_state_dict(vogn.state_dict())
        assert other.generator is not None
        with vogn.sampled_params():
            drawn = model[0].weight.detach().clone()
        with other.sampled_params():
            assert torch.equal(model[0].weight, drawn)

    def test_the_optimizers_own_object_stays(self, vogn: VOGN, make_vogn: Make, model: nn.Module) -> None:
        generator = generator_of(77)
        other = make_vogn(model, generator=generator)
        other.load_state_dict(vogn.state_dict())
        assert other.generator is generator
        assert generator.initial_seed() == 2

    def test_another_kind_of_device_is_refused(self, vogn: VOGN, make_vogn: Make, model: nn.Module) -> None:
        state = vogn.state_dict()
        state["generator"]["device"] = "cuda:0"
        with pytest.raises(OptionError, match="cuda:0"):
            make_vogn(model).load_state_dict(state)


class TestRefused:
    @pytest.fixture
    def changed(self, model: nn.Module, vogn: VOGN, train: Train, batch: Batch) -> dict[str, Any]:
        train(vogn)
        vogn.observe(*batch)
        return copy.deepcopy(vogn.state_dict())

    def refuse(self, vogn: VOGN, state: dict[str, Any], match: str) -> None:
        before = copy.deepcopy(vogn.state_dict())
        with pytest.raises(OptionError, match=match):
            vogn.load_state_dict(state)
        after = vogn.state_dict()
        assert after["param_groups"] == before["param_groups"]
        assert torch.equal(after["state"][0]["curvature"], before["state"][0]["curvature"])
        assert torch.equal(after["generator"]["state"], before["generator"]["state"])
        assert torch.equal(after["observations"]["parts"][0]["losses"], before["observations"]["parts"][0]["losses"])

    def test_the_state_of_another_optimizer(self, vogn: VOGN, model: nn.Module, changed: dict[str, Any]) -> None:
        self.refuse(vogn, torch.optim.Adam(model.parameters()).state_dict(), "not the state of a VOGN")

    def test_the_state_of_another_rule(self, vogn: VOGN, model: nn.Module, changed: dict[str, Any]) -> None:
        self.refuse(vogn, Vadam(model, cross_entropy, data_size=10).state_dict(), "state of a Vadam")

    def test_other_groups(self, vogn: VOGN, changed: dict[str, Any]) -> None:
        changed["param_groups"][0]["params"].pop()
        self.refuse(vogn, changed, "parameter groups")

    def test_other_shapes(self, vogn: VOGN, changed: dict[str, Any]) -> None:
        changed["state"][2]["curvature"] = torch.ones(5, 5)
        self.refuse(vogn, changed, r"\(5, 5\).*2\.weight")

    def test_other_moments(self, vogn: VOGN, changed: dict[str, Any]) -> None:
        changed["observations"]["parts"][0]["mean"]["7.weight"] = torch.ones(5)
        self.refuse(vogn, changed, "moments")

    def test_settings_out_of_range(self, vogn: VOGN, changed: dict[str, Any]) -> None:
        changed["param_groups"][0]["decay"] = 2.0
        self.refuse(vogn, changed, "decay=2.0")


class TestCopies:
    @pytest.mark.parametrize(
        "duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["deepcopy", "pickle"]
    )
    def test_go_on_alike_and_apart(
        self, duplicate: Callable[[Any], Any], batch: Batch, train: Train, mean_of: MeanOf, same: Same
    ) -> None:
        model = fresh(torch.float64)
        generator = generator_of(3)
        vogn = VOGN(model, cross_entropy, data_size=100, hess_init=0.5, backend="loop", generator=generator)
        train(vogn)
        vogn.observe(*batch)
        model_2, vogn_2 = duplicate((model, vogn))
        assert vogn_2.model is model_2
        assert vogn_2.source.model is model_2
        before = mean_of(model_2)
        vogn.step()
        train(vogn)
        assert same(mean_of(model_2), before)
        vogn_2.step()
        train(vogn_2)
        assert same(mean_of(model_2), mean_of(model))
