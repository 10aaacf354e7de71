"""`torch.distributed.checkpoint`, PyTorch's way to save and load any optimizer: a run goes on bit for bit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

from persample.errors import OptionError, UsageError
from persample.vogn import VOGN, MeanFieldVI

from ..ways import RULES, Batch, by_observing
from .test_damaged_state import layers, make, same, trained


def go_on(optimizer: Any, batch: Batch) -> list[Any]:
    for _ in range(2):
        by_observing(optimizer, *batch)
    return [*(p.detach() for p in optimizer.model.parameters()), *optimizer._precision(), optimizer.steps]


def assert_goes_on_alike(one: Any, other: Any, batch: Batch) -> None:
    for a, b in zip(go_on(one, batch), go_on(other, batch), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
class TestRoundTrips:
    """Into an optimizer that is fresh, and into one that has made steps."""

    def other(self, rule: Any, used: bool, batch: Batch, **settings: Any) -> Any:
        other = make(rule, layers(), **settings)
        if used:
            go_on(other, batch)
        return other

    @pytest.mark.parametrize(("flat", "full"), [(False, False), (True, False), (False, True)])  # both fail with Adam
    def test_of_model_and_optimizer(self, rule: Any, used: bool, flat: bool, full: bool, batch: Batch) -> None:
        options = StateDictOptions(flatten_optimizer_state_dict=flat, full_state_dict=full, cpu_offload=full)
        optimizer, other = trained(rule, batch), self.other(rule, used, batch, data_size=3, generator=None)
        weights, state = copy.deepcopy(get_state_dict(optimizer.model, optimizer, options=options))
        set_state_dict(other.model, other, model_state_dict=weights, optim_state_dict=state, options=options)
        assert (other.data_size, other.steps) == (100, 2)
        optimizer.step()  # with what waits
        other.step()
        assert_goes_on_alike(optimizer, other, batch)

    def test_of_the_optimizer_alone(self, rule: Any, used: bool, batch: Batch) -> None:
        optimizer, other = trained(rule, batch), self.other(rule, used, batch)
        set_model_state_dict(other.model, get_model_state_dict(optimizer.model))
        set_optimizer_state_dict(other.model, other, get_optimizer_state_dict(optimizer.model, optimizer))
        assert_goes_on_alike(optimizer, other, batch)

    def test_through_a_folder(self, rule: Any, used: bool, batch: Batch, tmp_path: Path) -> None:
        """What is read is what the optimizer that reads says that there is."""
        optimizer, other = trained(rule, batch), self.other(rule, used, batch)
        optimizer.step()
        weights, state = get_state_dict(optimizer.model, optimizer)
        dcp.save({"model": weights, "optimizer": state}, checkpoint_id=tmp_path, no_dist=True)
        weights, state = get_state_dict(other.model, other)
        both = {"model": weights, "optimizer": state}
        dcp.load(both, checkpoint_id=tmp_path, no_dist=True)
        set_state_dict(other.model, other, model_state_dict=both["model"], optim_state_dict=both["optimizer"])
        assert_goes_on_alike(optimizer, other, batch)

    def test_of_groups_and_parameters_in_another_order(self, rule: Any, used: bool, batch: Batch) -> None:
        def groups(model: Any, order: int) -> list[dict[str, Any]]:
            head = {"params": list(model[2].parameters())[::order], "lr": 0.03}
            return [{"params": list(model[0].parameters())[::order]}, head][::order]

        first, second = layers(), layers()
        optimizer = trained(rule, batch, model=first, params=groups(first, 1), generator=None)
        other = make(rule, second, params=groups(second, -1), generator=None)
        if used:
            go_on(other, batch)
        set_optimizer_state_dict(second, other, get_optimizer_state_dict(first, optimizer))
        for name, p in optimizer._params().items():
            assert same(optimizer.state[p], other.state[other._params()[name]])
            assert torch.equal(other.prior.mean[name], optimizer.prior.mean[name])
        assert [group["lr"] for group in other.param_groups] == [0.03, 0.01]


def test_asking_for_the_state_of_a_fresh_optimizer_changes_nothing(batch: Batch) -> None:
    for rule in RULES:
        optimizer, other = make(rule), make(rule, layers())
        before = [p.detach().clone() for p in optimizer.model.parameters()]
        get_optimizer_state_dict(optimizer.model, optimizer)
        assert all(torch.equal(p, value) for p, value in zip(optimizer.model.parameters(), before, strict=True))
        assert (optimizer.steps, optimizer.skipped_steps) == (0, 0)
        assert optimizer.param_groups[0]["lr"] == 0.01
        assert all(state["step"] == 0 for state in optimizer.state.values())
        assert_goes_on_alike(optimizer, other, batch)


def test_a_step_with_nothing_observed_is_refused_all_the_same(batch: Batch) -> None:
    """With gradients that are not zero, with a learning rate, or once there is a state."""
    for lr, gradient in ((0.0, 1.0), (0.1, 0.0), (0.0, None)):
        optimizer = make(VOGN, lr=lr)
        for p in optimizer.model.parameters():
            p.grad = None if gradient is None else torch.full_like(p, gradient)
        with pytest.raises(UsageError, match="Nothing was observed"):
            optimizer.step()
    optimizer = make(MeanFieldVI, lr=0.0)
    by_observing(optimizer, *batch)
    for p in optimizer.model.parameters():
        p.grad = torch.zeros_like(p)
    with pytest.raises(UsageError, match="Nothing was observed"):
        optimizer.step()


def test_what_is_not_the_optimizers_is_refused(batch: Batch) -> None:
    optimizer, adam_model = trained(VOGN, batch), layers()
    adam = torch.optim.Adam(adam_model.parameters())
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(OptionError, match="not the state of a VOGN"):
        set_optimizer_state_dict(optimizer.model, optimizer, get_optimizer_state_dict(adam_model, adam))
    mixed = get_optimizer_state_dict(optimizer.model, optimizer)
    mixed["param_groups"][0]["run"] = b"junk"
    with pytest.raises(OptionError, match="cannot be read"):
        set_optimizer_state_dict(optimizer.model, optimizer, mixed)
    assert optimizer.state_dict()["steps"] == before["steps"]


def test_groups_of_two_times_do_not_go_together(batch: Batch) -> None:
    model = layers()
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters()}]
    optimizer = trained(VOGN, batch, model=model, params=groups)
    early = get_optimizer_state_dict(model, optimizer)
    by_observing(optimizer, *batch)
    late = get_optimizer_state_dict(model, optimizer)
    late["param_groups"][0] = early["param_groups"][0]
    with pytest.raises(OptionError, match="from several times"):
        set_optimizer_state_dict(model, optimizer, late)


def test_a_parameter_that_was_added_since_is_saved_too(batch: Batch) -> None:
    model = layers()
    model[0].requires_grad_(False)
    optimizer = make(VOGN, model)
    by_observing(optimizer, *batch)
    model[0].requires_grad_(True)
    optimizer.add_param_group({"params": model[0].parameters()})
    assert len(optimizer.state_dict()["state"]) == 4
    other = make(VOGN, again := layers(), params=[{"params": m.parameters()} for m in (again[2], again[0])])
    other.load_state_dict(optimizer.state_dict())
