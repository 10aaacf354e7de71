"""One model with one mini-batch and one loss, and the assertion that a backend handles it rightly or refuses it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

import persample
from persample.errors import DisagreementError, UnsupportedModelError

from .backend_promises import ONLY_NUMBERS_TELL, promise_of
from .trace import no_trace
from .truth import Truth, call, per_sample_truth

Method = Literal["moments", "per_sample"]


@dataclass(frozen=True)
class Case:
    """What a backend is asked.

    Attributes:
        model: the network, in float64.
        inputs: a tensor, a tuple or a dict.
        targets: what the loss takes.
        loss_fn: what the backend is given.
        features: what a backend must be able to handle in order to serve this case, see `backend_promises`.
        true_loss_fn: the loss as plain tensor operations, where `loss_fn` is a loss module of `torch.nn`.
        seed: of the random numbers of the call.
    """

    model: nn.Module
    inputs: Any
    targets: Any
    loss_fn: Callable[[Any, Any], Any]
    features: frozenset[str]
    true_loss_fn: Callable[[Any, Any], Tensor] | None = None
    seed: int = 0

    def truth(self, stream: Any) -> Truth:
        loss_fn = self.true_loss_fn or self.loss_fn
        return per_sample_truth(self.model, loss_fn, self.inputs, self.targets, stream=stream, seed=self.seed)


def assert_right_or_refused(backend: str, case: Case, method: Method, check: str = "first") -> bool:
    """Assert everything that the contract promises for one call, and return whether the backend served the case."""
    promise = promise_of(backend)
    random = "random numbers" in case.features
    truth = case.truth(promise.stream if random else "none")
    source = persample.make_source(backend, case.model, case.loss_fn, check=check, **promise.options)
    due = _random_state_after_one_forward_pass(case)
    torch.manual_seed(case.seed)
    refusal: Exception | None = None
    with no_trace(case.model, case.inputs, case.targets):
        try:
            result = getattr(source, method)(case.inputs, case.targets)
        except (UnsupportedModelError, DisagreementError) as error:
            refusal = error
    if refusal is not None:
        missing = case.features - promise.serves
        assert missing, f"{backend!r} must serve {sorted(case.features)}, but refused: {refusal}"
        assert isinstance(refusal, UnsupportedModelError) or missing & ONLY_NUMBERS_TELL, refusal
        return False
    if not random or promise.stream == "batch":
        assert torch.equal(torch.get_rng_state(), due), "other random numbers were drawn than in one forward pass"
    if method == "moments":
        assert_moments(result, truth, case.model)
    else:
        assert_per_sample(result, truth, case.model)
    return True


def assert_moments(moments: persample.Moments, truth: Truth, model: nn.Module) -> None:
    size = len(truth.losses)
    assert moments.batch_size == size
    _assert_losses(moments.losses, truth)
    rounding = _rounding(truth)
    mean = {name: g.sum(0) / size for name, g in truth.gradients.items()}
    second_moment = {name: g.square().sum(0) / size for name, g in truth.gradients.items()}
    _assert_same(moments.mean, mean, model, rounding)
    _assert_same(moments.second_moment, second_moment, model, rounding * _largest(truth.gradients))


def assert_per_sample(gradients: dict[str, Tensor], truth: Truth, model: nn.Module) -> None:
    _assert_same(gradients, truth.gradients, model, _rounding(truth))


def _assert_losses(losses: Tensor, truth: Truth) -> None:
    assert not losses.requires_grad
    assert losses.shape == truth.losses.shape
    torch.testing.assert_close(losses, truth.losses, rtol=1e-9, atol=1e-12)


def _largest(values: dict[str, Tensor]) -> float:
    return max((value.abs().max().item() for value in values.values() if value.numel()), default=0.0)


def _rounding(truth: Truth) -> float:
    """What is left of gradients that vanish in exact arithmetic: rounding in the unit of the others and of the loss."""
    return 1e-11 * _largest(truth.gradients) + 1e-13 * truth.losses.abs().max().item()


def _assert_same(actual: Any, expected: dict[str, Tensor], model: nn.Module, rounding: float) -> None:
    """Assert that both are the same to 1e-9 relative, entry by entry, but for the rounding of vanishing gradients."""
    parameters = dict(model.named_parameters())
    assert list(actual) == list(expected), "keys, or their order"
    for name, value in expected.items():
        assert type(actual[name]) is Tensor, f"{name} is a {type(actual[name])}"
        assert not actual[name].requires_grad
        assert actual[name].layout is torch.strided
        assert actual[name].dtype == parameters[name].dtype
        assert actual[name].device == parameters[name].device
        torch.testing.assert_close(
            actual[name], value, rtol=1e-9, atol=rounding, msg=lambda text, name=name: f"{name}: {text}"
        )


def _random_state_after_one_forward_pass(case: Case) -> Tensor:
    torch.manual_seed(case.seed)
    with torch.no_grad():
        call(copy.deepcopy(case.model), case.inputs)
    return torch.get_rng_state()
