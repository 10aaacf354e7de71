"""A state that is damaged, reordered, cast or foreign is refused and changes nothing, or its names are followed."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from persample.errors import OptionError, PersampleError
from persample.losses import cross_entropy
from persample.testing.devices import generator_of, on_cuda
from persample.vogn import IVON, OGN, VOGN, MeanFieldVI, Vadam

from ..ways import RULES, Batch, by_observing

Change = Callable[[dict[str, Any]], Any]


def layers(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Two layers of the same shapes, so that exchanged parameters fit."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).to(dtype)


def make(rule: Any, model: Any = None, **settings: Any) -> Any:
    model = model or layers()
    prior_mean = {name: torch.full_like(p, i) for i, (name, p) in enumerate(model.named_parameters())}
    own = {"hess_init": 0.5, "momentum": 0.5, "backend": "loop"} if issubclass(rule, VOGN) else {}
    defaults = {
        "data_size": 100,
        "lr": 0.01,
        "prior_mean": prior_mean,
        "generator": generator_of(2),
    }
    return rule(model, cross_entropy, **(defaults | own | settings))


def trained(rule: Any, batch: Batch, **settings: Any) -> Any:
    optimizer = make(rule, **settings)
    for _ in range(2):
        by_observing(optimizer, *batch)
    optimizer.observe(*batch)
    return optimizer


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one if key != "run")
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def first(state: dict[str, Any]) -> dict[str, Any]:
    return state["state"][0]


def tensor_of(state: dict[str, Any]) -> str:
    return next(key for key in ("rho", "hessian", "curvature") if key in first(state))


def set_tensor(value: Callable[[Tensor], Any]) -> Change:
    return lambda state: first(state).update({tensor_of(state): value(first(state)[tensor_of(state)])})


def set_run(**entries: Any) -> Change:
    return lambda state: state.update(entries)


def set_group(**entries: Any) -> Change:
    return lambda state: state["param_groups"][0].update(entries)


def set_part(**entries: Any) -> Change:
    return lambda state: state["observations"]["parts"][0].update(entries)


DAMAGES: dict[str, tuple[Change, str]] = {
    "a tensor is missing": (lambda s: first(s).pop(tensor_of(s)), "'0.weight' is damaged: .* is missing"),
    "a state is missing": (lambda s: s["state"].pop(1), r"that of '0\.bias' is missing"),
    "a state is empty": (lambda s: s["state"].update({1: {}}), r"that of '0\.bias' is missing"),
    "a state is none": (lambda s: s["state"].update({1: 5}), "of type int"),
    "states are missing": (lambda s: s.update(state={}), "is missing"),
    "a state too many": (lambda s: s["state"].update({9: first(s)}), "state of 9, which is in no group"),
    "an entry too many": (lambda s: first(s).update(exp_avg=torch.zeros(3, 3)), "entry 'exp_avg'"),
    "not a number": (set_tensor(lambda t: t * torch.nan), "must be finite"),
    "infinite": (set_tensor(lambda t: t + torch.inf), "must be finite"),
    "cast to half precision": (set_tensor(lambda t: t.bfloat16()), "of torch.bfloat16.*it was cast"),
    "cast to whole numbers": (set_tensor(lambda t: t.long()), "of torch.int64.*it was cast"),
    "complex": (set_tensor(lambda t: t + 0j), "of torch.complex128"),
    "flattened": (set_tensor(lambda t: t.flatten()), r"shape \(9,\) .*has \(3, 3\)"),
    "one row": (set_tensor(lambda t: t[:1]), r"shape \(1, 3\)"),
    "sparse": (set_tensor(lambda t: t.to_sparse()), "must be an ordinary tensor"),
    "without values": (set_tensor(lambda t: t.to("meta")), "must be an ordinary tensor"),
    "a list": (set_tensor(lambda t: t.tolist()), "must be an ordinary tensor, not a list"),
    "steps of a parameter < 0": (lambda s: first(s).update(step=-1), "step of '0.weight' must be a whole number"),
    "more steps than steps": (lambda s: first(s).update(step=3), "from 0 to 2, not 3"),
    "steps are a fraction": (lambda s: first(s).update(step=1.5), "whole number"),
    "steps of the optimizer < 0": (set_run(steps=-7), "steps=-7"),
    "steps='x'": (set_run(steps="x"), "steps='x'"),
    "fewer steps than of a parameter": (set_run(steps=1), "from 0 to 1, not 2"),
    "skipped more in a row than at all": (set_run(skipped_in_a_row=3), "skipped in a row"),
    "data_size": (set_run(data_size=-3), "data_size=-3"),
    "data_size is no number": (set_run(data_size=True), "data_size=True"),
    "augmentation": (set_run(augmentation=0), "augmentation=0"),
    "mc_samples": (set_run(mc_samples=-5), "mc_samples=-5"),
    "loss_reduction": (set_run(loss_reduction="z"), "loss_reduction='z'"),
    "max_grad_norm": (set_run(max_grad_norm="z"), "max_grad_norm='z'"),
    "an entry of the run is missing": (lambda s: s.pop("augmentation"), "augmentation is missing"),
    "a truncated dict": (lambda s: s.pop("param_groups"), "param_groups is missing"),
    "groups are no list": (lambda s: s.update(param_groups=5), "param_groups a list"),
    "a group is no dict": (lambda s: s.update(param_groups=[5]), "must be a dict"),
    "no groups": (lambda s: s.update(param_groups=[]), r"groups of \[\] parameters"),
    "lr is missing": (lambda s: s["param_groups"][0].pop("lr"), "lacks the setting 'lr'"),
    "lr is negative": (set_group(lr=-1.0), r"lr=-1\.0"),
    "lr is True": (set_group(lr=True), "lr=True"),
    "an unknown setting": (set_group(weight_decay=0.1), "'weight_decay'"),
    "numbers are exchanged": (lambda s: s["param_groups"][0]["params"].reverse(), "numbered in their order"),
    "numbers are repeated": (set_group(params=[0, 1, 1, 3]), "numbered in their order"),
    "numbers are tensors": (set_group(params=[torch.zeros(2)] * 4), "numbered in their order"),
    "a name is missing": (lambda s: s["param_groups"][0]["param_names"].pop(), "numbers of names"),
    "names are numbers": (set_group(param_names=[1, 2, 3, 4]), "must be strings"),
    "priors are missing": (lambda s: s["param_groups"][0]["prior_mean"].pop(), "3 tensors for 4 parameters"),
    "priors of other shapes": (set_group(prior_mean=[torch.zeros(3)] * 4), r"shape \(3,\) for prior_mean"),
    "a generator of zeros": (set_run(generator=torch.zeros(5)), "generator is damaged"),
    "a generator of other bytes": (
        lambda s: s["generator"].update(state=torch.zeros(5056, dtype=torch.uint8)), "state of a generator is damaged",
    ),
    "half a generator": (lambda s: s["generator"].update(state=s["generator"]["state"][:99]), "is damaged"),
    "a generator nowhere": (lambda s: s["generator"].update(device="nowhere"), "'nowhere' is no device"),
    "observations are a list": (set_run(observations=[1, 2]), "saved moments"),
    "observations are half": (lambda s: s["observations"].pop("parts"), "saved moments"),
    "draws are missing": (lambda s: s["observations"].update(draws=[]), "saved moments"),
    "draws of other bytes": (
        lambda s: s["observations"].update(draws=[{"own": torch.zeros(3, dtype=torch.uint8)}]), "generator is damaged",
    ),
    "no losses": (set_part(losses=torch.zeros(0)), "losses must be a vector"),
    "moments are missing": (set_part(mean={}), "do not belong together|another rule"),
    "moments of other shapes": (
        lambda s: s["observations"]["parts"][0]["mean"].update({"0.weight": torch.ones(2)}), r"shape \(2,\) for mean",
    ),
    "noise where it does not belong": (
        lambda s: set_part(noise=None if s["observations"]["parts"][0]["noise"] else {})(s), "another rule",
    ),
}  # fmt: skip


OF_A_CPUS_GENERATOR = ("a generator of other bytes", "half a generator", "draws of other bytes")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_damages_are_refused_and_nothing_is_changed(rule: Any, damage: str, batch: Batch) -> None:
    if on_cuda() and damage in OF_A_CPUS_GENERATOR:
        pytest.skip("the generator of a GPU has other states")
    change, match = DAMAGES[damage]
    state = copy.deepcopy(trained(rule, batch).state_dict())
    change(state)
    optimizer = make(rule, lr=0.02)
    optimizer.observe(*batch)
    before, generator = copy.deepcopy(optimizer.state_dict()), optimizer.generator
    with pytest.raises(OptionError, match=match):
        optimizer.load_state_dict(state)
    assert same(before, optimizer.state_dict())
    assert optimizer.generator is generator
    optimizer.step()


@pytest.mark.parametrize(
    ("rule", "key", "value"),
    [
        (VOGN, "curvature", -1.0),
        (OGN, "curvature", -1e-30),
        (Vadam, "curvature", -1.0),
        (MeanFieldVI, "mean_second", -1.0),
        (MeanFieldVI, "rho_second", -1.0),
    ],
)
def test_squares_are_not_negative(rule: Any, key: str, value: float, batch: Batch) -> None:
    state = copy.deepcopy(trained(rule, batch).state_dict())
    first(state)[key][0, 0] = value
    with pytest.raises(OptionError, match=rf"{key} of '0\.weight' must be finite numbers >= 0"):
        make(rule).load_state_dict(state)


@pytest.mark.parametrize(
    ("rule", "key"),
    [(VOGN, "momentum_mass"), (IVON, "momentum_mass"), (Vadam, "average_mass"), (MeanFieldVI, "second_mass")],
)
def test_masses_are_from_0_to_1(rule: Any, key: str, batch: Batch) -> None:
    for value in (1.5, -0.1, float("nan"), "x", None):
        state = copy.deepcopy(trained(rule, batch).state_dict())
        first(state)[key] = value
        with pytest.raises(OptionError, match=rf"{key} of '0\.weight' must be a number from 0 to 1"):
            make(rule).load_state_dict(state)


def test_momentum_comes_as_a_pair(batch: Batch) -> None:
    for key in ("momentum_buffer", "momentum_mass"):
        state = copy.deepcopy(trained(VOGN, batch).state_dict())
        first(state).pop(key)
        with pytest.raises(OptionError, match="lacks one of momentum_buffer and momentum_mass"):
            make(VOGN).load_state_dict(state)


@pytest.mark.parametrize("rule", RULES)
def test_what_is_foreign_is_refused(rule: Any, batch: Batch) -> None:
    optimizer = make(rule)
    adam = torch.optim.Adam(optimizer.model.parameters())
    foreign: list[Any] = [None, [], "state", 5, {}, adam.state_dict(), nn.Linear(3, 3).state_dict()]
    foreign += [
        trained(other, batch).state_dict() for other in (VOGN, IVON, Vadam, MeanFieldVI) if other.rule != rule.rule
    ]
    for state in foreign:
        with pytest.raises(OptionError, match=f"not the state of a {rule.rule}|This is the state of a"):
            optimizer.load_state_dict(state)


@pytest.mark.parametrize("rule", RULES)
class TestNames:
    """Parameters in another order are found by their names, with their groups and their own priors."""

    def check(self, optimizer: Any, other: Any, batch: Batch) -> None:
        for name, p in optimizer._params().items():
            assert same(optimizer.state[p], other.state[other._params()[name]])
        assert same(dict(optimizer.prior.mean), dict(other.prior.mean))
        assert same(optimizer._pending.observations.packed(), other._pending.observations.packed())
        optimizer.step()
        other.step()
        for name, p in optimizer._params().items():
            torch.testing.assert_close(other._params()[name], p, rtol=1e-12, atol=1e-15)

    def test_in_another_order(self, rule: Any, batch: Batch) -> None:
        optimizer, model = trained(rule, batch), layers()
        model.load_state_dict(optimizer.model.state_dict())
        other = make(rule, model, params=list(model.parameters())[::-1])
        other.load_state_dict(optimizer.state_dict())
        self.check(optimizer, other, batch)

    def test_groups_in_another_order(self, rule: Any, batch: Batch) -> None:
        model = layers()
        groups = [{"params": model[0].parameters(), "lr": 0.03}, {"params": model[2].parameters()}]
        optimizer, again = trained(rule, batch, model=model, params=groups), layers()
        again.load_state_dict(model.state_dict())
        other = make(rule, again, params=[{"params": again[2].parameters()}, {"params": again[0].parameters()}])
        other.load_state_dict(optimizer.state_dict())
        assert [group["lr"] for group in other.param_groups] == [0.01, 0.03]
        self.check(optimizer, other, batch)

    def test_of_a_compiled_model(self, rule: Any, batch: Batch) -> None:
        optimizer, model = trained(rule, batch), layers()
        model.load_state_dict(optimizer.model.state_dict())
        compiled = torch.compile(model)
        other = make(rule, compiled, params=list(compiled.parameters())[::-1])
        other.load_state_dict(optimizer.state_dict())
        for name, p in optimizer._params().items():
            assert same(optimizer.state[p], other.state[other._params()[f"_orig_mod.{name}"]])
        optimizer.step()
        other.step()
        torch.testing.assert_close(model[2].weight, optimizer.model[2].weight)

    def test_some_of_which_are_others_in_other_places_are_refused(self, rule: Any, batch: Batch) -> None:
        state = trained(rule, batch).state_dict()
        model = nn.ModuleDict({"2": nn.Linear(3, 3), "5": nn.Linear(3, 3)}).double()
        with pytest.raises(OptionError, match=r"'0\.weight' where this optimizer has '2\.weight'"):
            make(rule, model).load_state_dict(state)

    def test_other_ones_go_by_position(self, rule: Any, batch: Batch) -> None:
        optimizer = trained(rule, batch)
        model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)}).double()
        other = make(rule, model)
        other.load_state_dict(optimizer.state_dict())
        assert same(other.state[model["b"].weight], optimizer.state[optimizer.model[2].weight])
        assert same(
            other._pending.observations.gradient()["b.bias"], optimizer._pending.observations.gradient()["2.bias"]
        )

    def test_groups_that_were_cut_otherwise_are_refused(self, rule: Any, batch: Batch) -> None:
        state, model = trained(rule, batch).state_dict(), layers()
        for cut in (1, 2):
            params = list(model.parameters())
            with pytest.raises(OptionError, match="parameter groups"):
                make(rule, model, params=[{"params": params[:cut]}, {"params": params[cut:]}]).load_state_dict(state)
        first, second = layers(), layers()
        params, others = list(first.parameters()), list(second.parameters())
        state = trained(rule, batch, model=first, params=[{"params": params[:2]}, {"params": params[2:]}]).state_dict()
        with pytest.raises(OptionError, match="No parameter group of the saved state"):
            make(rule, second, params=[{"params": others[::2]}, {"params": others[1::2]}]).load_state_dict(state)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.float64, torch.float32)])
def test_a_model_of_another_precision_goes_on(rule: Any, dtypes: Any, batch: Batch) -> None:
    """The state, what was observed and the priors follow the parameters."""
    x, y = batch
    optimizer = trained(rule, (x.to(dtypes[0]), y), model=layers(dtypes[0]))
    other = make(rule, layers(dtypes[1]))
    other.model.load_state_dict(optimizer.model.state_dict())
    other.load_state_dict(optimizer.state_dict())
    for one in (optimizer, other):
        one.step()
    torch.testing.assert_close(other.model[0].weight.float(), optimizer.model[0].weight.float())
    optimizer.observe(x.to(dtypes[0]), y)
    optimizer.model.to(dtypes[1])  # between observing and the step
    optimizer.step()


def test_schedulers_and_unknown_ones_keep_what_they_put_into_groups(batch: Batch) -> None:
    optimizer, other = trained(VOGN, batch), make(VOGN)
    for one in (optimizer, other):
        torch.optim.lr_scheduler.OneCycleLR(one, max_lr=0.1, total_steps=10)
        one.param_groups[0]["of_a_scheduler"] = 5
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["of_a_scheduler"] == 5
    assert other.param_groups[0]["max_lr"] == 0.1


def test_hooks_may_adapt_a_state_before_it_is_checked(batch: Batch) -> None:
    state = trained(VOGN, batch).state_dict()
    state["of_old"] = state.pop("augmentation")
    optimizer, after = make(VOGN), []
    optimizer.register_load_state_dict_pre_hook(lambda _, s: {**s, "augmentation": s["of_old"]})
    optimizer.register_load_state_dict_post_hook(lambda o: after.append(o.steps))
    optimizer.load_state_dict(state)
    assert after == [2]
    assert "augmentation" not in state


# Damages nobody thought of: an entry, drawn at random, is replaced by junk, removed, or exchanged for another one.


def places(tree: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    entries = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in entries:
        yield (*at, key)
        yield from places(value, (*at, key))


JUNK = [None, "x", -1, 3.7, float("nan"), True, [], {}, {"a": 1}, torch.zeros(5), b"abc", object(), 10**30, ("a",)]


def damage(state: Any, draw: random.Random) -> None:
    *path, key = draw.choice(list(places(state)))
    for step in path:
        state = state[step]
    way = draw.choice(["junk", "junk", "removed", "exchanged"])
    if way == "junk":
        state[key] = draw.choice(JUNK)
    elif way == "removed":
        state.pop(key)
    else:
        other = draw.choice(list(state) if isinstance(state, dict) else range(len(state)))
        state[key], state[other] = state[other], state[key]


@pytest.mark.parametrize("rule", [VOGN, IVON, Vadam, MeanFieldVI])
def test_drawn_damages_are_refused_or_harmless(rule: Any, batch: Batch) -> None:
    whole = trained(rule, batch).state_dict()
    for seed in range(150):
        state = copy.deepcopy(whole)
        draw = random.Random(seed)
        if seed % 3 == 0:  # as torch.distributed.checkpoint keeps it
            state = {key: state[key] for key in ("state", "param_groups")}
        damage(state, draw)
        optimizer = make(rule)
        optimizer.observe(*batch)
        before = copy.deepcopy(optimizer.state_dict())
        try:
            optimizer.load_state_dict(state)
        except OptionError:
            assert same(before, optimizer.state_dict()), seed
            continue
        try:
            optimizer.observe(*batch, redraw=seed % 2 == 0)
            optimizer.step()
        except PersampleError:
            pass
