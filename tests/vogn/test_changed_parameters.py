"""The model changes after the optimizer was created: refused, warned of or followed, in every call, for every rule."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from persample import losses
from persample.errors import UnsupportedModelError, UsageError
from persample.vogn import VOGN, UntrainedParameterWarning, VariationalOptimizer

from .ways import RULES, Batch, by_closure, by_context, by_observing, make, network


def new_head(model: Any) -> None:
    model[2] = nn.Linear(4, 2).double()


def assigned(model: Any) -> None:
    model.load_state_dict({name: value + 1 for name, value in model.state_dict().items()}, assign=True)


def overwritten(model: Any) -> None:
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        model.float().double()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


def tied(model: Any) -> None:
    model[2].weight = nn.Parameter(model[2].weight.detach().clone())


def without_bias(model: Any) -> None:
    model[2].bias = None


def weight_norm(model: Any) -> None:
    parametrizations.weight_norm(model[2])


def grown(model: Any) -> None:
    model[2].weight.data = torch.cat([model[2].weight.data, torch.zeros(1, 4).double()])
    model[2].bias.data = torch.zeros(3).double()


def one_row(model: Any) -> None:  # of a shape that broadcasts against what is kept
    model[2].weight.data = model[2].weight.data[:1]
    model[2].bias.data = torch.zeros(1).double()


def tied_by_memory(model: Any) -> None:
    model[2].weight.data = model[0].weight.data[:2]


CHANGES = [
    (new_head, r"'2\.weight' was replaced.*create the optimizer afterwards"),
    (assigned, r"'0\.weight' was replaced.*assign=True"),
    (overwritten, r"'0\.weight' was replaced"),
    (tied, r"'2\.weight' was replaced"),
    (without_bias, r"'2\.bias' was removed"),
    (weight_norm, r"'2\.weight' was removed"),
    (grown, r"'2\.weight' has shape \(3, 4\).*posterior has \(2, 4\)"),
    (one_row, r"'2\.weight' has shape \(1, 4\).*posterior has \(2, 4\)"),
    (tied_by_memory, r"'0\.weight' and '2\.weight' share memory"),
]

CALLS: dict[str, Callable[[VariationalOptimizer, Tensor, Tensor], Any]] = {
    "observe": by_observing,
    "block": by_context,
    "closure": by_closure,
    "step": lambda optimizer, x, y: optimizer.step(),
    "sampled_params": lambda optimizer, x, y: optimizer.sampled_params().__enter__(),
    "predict": lambda optimizer, x, y: optimizer.predict(x),
    "predict_gaussian": lambda optimizer, x, y: optimizer.predict_gaussian(x),
    "elbo": lambda optimizer, x, y: optimizer.elbo(x, y),
    "posterior": lambda optimizer, x, y: optimizer.posterior,
    "prior": lambda optimizer, x, y: optimizer.prior,
    "diagnostics": lambda optimizer, x, y: optimizer.diagnostics(),
    "state_dict": lambda optimizer, x, y: optimizer.state_dict(),
    "load_state_dict": lambda optimizer, x, y: optimizer.load_state_dict({}),
}


@pytest.mark.parametrize(("change", "match"), CHANGES)
@pytest.mark.parametrize("rule", RULES)
def test_what_cannot_be_followed_is_refused_by_every_call(
    rule: Any, change: Callable[[Any], None], match: str, batch: Batch
) -> None:
    model = network()
    if change is tied_by_memory:
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2), nn.Linear(2, 2)).double()
        model[0], model[2] = nn.Linear(3, 3).double(), nn.Linear(3, 2).double()
    optimizer = make(rule, model=model)
    by_observing(optimizer, *batch)
    optimizer.observe(*batch)
    change(model)
    before = [p.detach().clone() for p in model.parameters()]
    for call in CALLS.values():
        with pytest.raises(UsageError, match=match):
            call(optimizer, *batch)
    assert all(torch.equal(p, value) for p, value in zip(model.parameters(), before, strict=True))


def test_before_the_first_use_too(batch: Batch) -> None:
    for change in (new_head, without_bias):
        model = network()
        optimizer = make(model=model)
        change(model)
        with pytest.raises(UsageError, match="after the optimizer was created"):
            optimizer.observe(*batch)


def test_a_prior_for_each_weight_stands_in_the_way_of_another_shape(batch: Batch) -> None:
    model = network()
    optimizer = make(model=model, prior_mean={name: torch.zeros_like(p) for name, p in model.named_parameters()})
    grown(model)
    with pytest.raises(UsageError, match=r"'2\.weight' has shape \(3, 4\)"):
        optimizer.observe(*batch)


def test_resized_before_the_first_use_nothing_is_known_yet(batch: Batch) -> None:
    model = network()
    optimizer = make(model=model)
    grown(model)
    by_observing(optimizer, *batch)
    assert optimizer.posterior.mean["2.weight"].shape == (3, 4)


def test_a_change_in_the_block_or_the_closure_is_noticed_by_the_step(batch: Batch) -> None:
    x, y = batch
    for way in ("block", "closure"):
        optimizer = make()

        def run(optimizer: Any = optimizer) -> None:
            F.cross_entropy(optimizer.model(x), y).backward()
            new_head(optimizer.model)

        if way == "block":
            with optimizer.sampled_params(train=True):
                run()
        with pytest.raises(UsageError, match="was replaced"):
            optimizer.step(run if way == "closure" else None)


def test_what_was_refused_goes_on_once_it_is_as_before(batch: Batch) -> None:
    model = network()
    optimizer = make(model=model)
    head, model[2] = model[2], nn.Linear(4, 2).double()
    with pytest.raises(UsageError):
        optimizer.observe(*batch)
    model[2] = head
    by_observing(optimizer, *batch)


class TestGroupsChangedByHand:
    """The replaced layer's parameters put into the place of the old ones, as is done with other optimizers."""

    @pytest.mark.parametrize("rule", RULES)
    def test_new_ones_begin_anew(self, rule: Any, batch: Batch) -> None:
        optimizer = make(rule)
        by_observing(optimizer, *batch)
        new_head(optimizer.model)
        group, head = optimizer.param_groups[0], optimizer.model[2]
        group["params"][2:] = [head.weight, head.bias]
        before = head.weight.detach().clone()
        by_observing(optimizer, *batch)
        assert not torch.equal(head.weight, before)
        assert [optimizer.state[p]["step"] for p in optimizer.model.parameters()] == [2, 2, 1, 1]
        again = make(rule)
        again.load_state_dict(optimizer.state_dict())

    @pytest.mark.parametrize("call", CALLS)
    def test_others_are_refused(self, call: str, batch: Batch) -> None:
        optimizer = make()
        optimizer.observe(*batch)
        optimizer.param_groups[0]["params"].append(nn.Parameter(torch.ones(2)))
        with pytest.raises(UsageError, match=r"shape \(2,\) was added to a group by hand"):
            CALLS[call](optimizer, *batch)

    def test_priors_for_each_weight_must_be_changed_too(self, batch: Batch) -> None:
        model = network()
        optimizer = make(model=model, prior_mean={name: torch.zeros_like(p) for name, p in model.named_parameters()})
        optimizer.param_groups[0]["params"].pop()
        with pytest.raises(UsageError, match="a tensor for each parameter"):
            optimizer.observe(*batch)


class TestFollowed:
    @pytest.mark.parametrize("rule", RULES)
    def test_moves_and_casts(self, rule: Any, batch: Batch) -> None:
        optimizer = make(rule)
        by_observing(optimizer, *batch)
        optimizer.model.float()
        by_observing(optimizer, batch[0].float(), batch[1])
        assert optimizer.steps == 2

    @pytest.mark.parametrize("rule", RULES)
    def test_new_names_of_the_same_parameters(self, rule: Any, batch: Batch) -> None:
        """Pruning keeps the parameter, under another name, and computes the weight from it."""
        optimizer, model = make(rule, "loop"), network()
        optimizer = make(rule, "loop", model=model)
        by_observing(optimizer, *batch)
        prune.random_unstructured(model[0], "weight", amount=0.5)
        kept = (model[0].weight_mask == 1).clone()
        before = model[0].weight_orig.detach().clone()
        by_observing(optimizer, *batch)
        assert not torch.equal(model[0].weight_orig[kept], before[kept])
        assert "0.weight_orig" in optimizer.posterior.mean
        assert optimizer.state[model[0].weight_orig]["step"] == 2
        optimizer.predict(batch[0], samples=3)

    def test_new_names_between_observing_and_the_step_are_refused(self, batch: Batch) -> None:
        optimizer = make(backend="loop")
        optimizer.observe(*batch)
        prune.random_unstructured(optimizer.model[0], "weight", amount=0.5)
        with pytest.raises(UsageError, match=r"zero_grad\(\) to discard"):
            optimizer.step()
        optimizer.zero_grad()
        by_observing(optimizer, *batch)


class TestUntrained:
    """New parameters are said to be untrained, once, and can be added."""

    @pytest.mark.parametrize("rule", RULES)
    def test_thawed_ones(self, rule: Any, batch: Batch) -> None:
        model = network()
        model[0].requires_grad_(False)
        optimizer = make(rule, model=model)
        by_observing(optimizer, *batch)
        model[0].requires_grad_(True)
        with pytest.warns(UntrainedParameterWarning, match=r"'0\.weight', '0\.bias'.*add_param_group") as caught:
            optimizer.observe(*batch)
        assert [w.filename for w in caught] == [__file__]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            by_observing(optimizer, *batch)
        before = model[0].weight.detach().clone()
        optimizer.add_param_group({"params": model[0].parameters()})
        by_observing(optimizer, *batch)
        assert not torch.equal(model[0].weight, before)

    def test_a_new_layer_beside_the_old_ones(self, batch: Batch) -> None:
        optimizer = make()
        optimizer.model.append(nn.Linear(2, 2).double())
        with pytest.warns(UntrainedParameterWarning, match=r"'3\.weight'"):
            by_observing(optimizer, *batch)

    def test_an_untied_one(self, batch: Batch) -> None:
        model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double()
        model[2].weight = model[0].weight
        optimizer = make(model=model)
        by_observing(optimizer, *batch)
        model[2].weight = nn.Parameter(model[0].weight.detach().clone())
        with pytest.warns(UntrainedParameterWarning, match=r"'2\.weight'"):
            by_observing(optimizer, *batch)

    def test_those_left_out_on_purpose_are_not_spoken_of(self, batch: Batch) -> None:
        model = network()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            optimizer = make(model=model, params=model[0].parameters())
            by_observing(optimizer, *batch)
            model[2].requires_grad_(False)
            by_observing(optimizer, *batch)
            model[2].requires_grad_(True)
            by_observing(optimizer, *batch)

    def test_copies_know_what_was_said(self, batch: Batch) -> None:
        model = network()
        model[0].requires_grad_(False)
        optimizer = make(model=model)
        model[0].requires_grad_(True)
        with pytest.warns(UntrainedParameterWarning):
            optimizer.observe(*batch)
        for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                by_observing(other, *batch)


def test_memory_is_shared_from_the_beginning() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight.data = model[0].weight.data
    with pytest.raises(UsageError, match="before the optimizer is created"):
        VOGN(model, losses.cross_entropy, data_size=10)


def test_empty_parameters_share_nothing() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    model.one, model.other = nn.Parameter(torch.empty(0)), nn.Parameter(torch.empty(0))
    VOGN(model, losses.cross_entropy, data_size=10)


@pytest.fixture
def group() -> Any:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_sharded_after_the_optimizer_was_made(group: Any, batch: Batch) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    optimizer = make()
    by_observing(optimizer, *batch)
    fully_shard(optimizer.model, mesh=init_device_mesh("cpu", (1,)))
    for call in CALLS.values():
        with pytest.raises(UnsupportedModelError, match=r"'0\.weight' is part of a tensor sharded"):
            call(optimizer, *batch)
