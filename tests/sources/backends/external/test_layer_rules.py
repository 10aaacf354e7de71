"""What both adapters have in common: how a model uses its layers, and that nothing stays behind.

By their own machinery where that is right, and by their rules for single layers.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, weight_norm
from torch.utils.checkpoint import checkpoint

import persample
from persample.errors import PersampleError, UnsupportedModelError
from persample.testing.devices import generator_of

from ...agreement import assert_refused, assert_served, no_trace, squared_error, targets_for

pytest.importorskip("backpack")
pytest.importorskip("opacus")


@pytest.fixture(params=["backpack", "backpack (rules)", "opacus", "opacus (rules)"])
def peer(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["backpack (rules)", "opacus (rules)"])
def rules(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


class Custom(nn.Module):
    """Modules by name, and a forward written as a function of the module and its input."""

    def __init__(self, forward: Callable[..., Tensor], **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self._run = forward
        self.double()

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._run(self, *args, **kwargs)


def reals(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def small_convnet(**options: Any) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(**options), nn.Flatten(), nn.Linear(48, 4), nn.ReLU(**options),
        nn.Linear(4, 3),
    ).double()  # fmt: skip


@pytest.mark.parametrize("size", [1, 2, 5])
def test_serves_a_convnet_for_all_batch_sizes(peer: str, size: int) -> None:
    assert_served(peer, small_convnet(), reals(size, 2, 4, 4))


def test_serves_activations_in_place(peer: str) -> None:
    assert_served(peer, small_convnet(inplace=True), reals(3, 2, 4, 4))


def test_serves_a_residual_addition_in_place(peer: str) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        h = self.first(x)
        h += x
        h *= 2
        return self.second(h.tanh())

    assert_served(peer, Custom(forward, first=nn.Linear(4, 4), second=nn.Linear(4, 2)), reals(3, 4))


def test_serves_eval_mode(peer: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.Linear(4, 2)).double().eval()
    assert_served(peer, model, reals(3, 4))


def test_dropout_draws_what_one_forward_pass_draws(peer: str) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(), nn.Linear(8, 2)).double()
    assert_served(peer, model, reals(5, 4), seed=7)


def test_serves_frozen_and_unused_parameters(peer: str) -> None:
    model = Custom(
        lambda self, x: self.c(self.b(self.a(x)).relu()),
        a=nn.Linear(4, 4), b=nn.Linear(4, 4), c=nn.Linear(4, 2), unused=nn.Linear(2, 2),
    )  # fmt: skip
    model.a.requires_grad_(False)
    model.b.weight.requires_grad_(False)
    model.c.bias.requires_grad_(False)
    assert_served(peer, model, reals(3, 4))


def test_gives_zeros_if_the_loss_reaches_no_parameter(peer: str) -> None:
    model = Custom(lambda self, x: self.layer(x).detach() + x, layer=nn.Linear(3, 3))
    assert_served(peer, model, reals(2, 3))
    model.requires_grad_(False)
    assert_served(peer, model, reals(2, 3))


def test_adds_up_the_uses_of_a_layer_that_is_called_twice(peer: str) -> None:
    layer = nn.Linear(4, 4)
    assert_served(peer, Custom(lambda self, x: self.a(self.a(x).tanh()) + self.a(x / 2), a=layer), reals(3, 4))
    convolution = nn.Conv2d(2, 2, 3, padding=1)
    assert_served(peer, Custom(lambda self, x: self.a(self.a(x).tanh()), a=convolution), reals(3, 2, 4, 4))


def test_a_second_call_that_nothing_depends_on_changes_nothing(peer: str) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.a(x)
        self.a(100 * x)
        self.a(10 * x).detach()
        return y

    assert_served(peer, Custom(forward, a=nn.Linear(4, 2)), reals(3, 4))


def test_adds_up_the_uses_of_tied_parameters(peer: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 2)).double()
    model[2].weight = model[0].weight
    assert_served(peer, model, reals(3, 4))


def test_serves_linear_layers_on_sequences(peer: str) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 3, bias=False)).double()
    assert_served(peer, model, reals(3, 6, 4))
    assert_served(peer, model, reals(1, 2, 1, 4))
    assert_served(peer, model, reals(3, 4, 6).mT)


def test_serves_keyword_and_tuple_inputs(peer: str) -> None:
    model = Custom(lambda self, x, shift=None: self.b(input=self.a(x) + shift), a=nn.Linear(4, 4), b=nn.Linear(4, 2))
    assert_served(peer, model, (reals(3, 4), reals(3, 4)))
    assert_served(peer, model, {"x": reals(3, 4), "shift": reals(3, 4)})


def test_serves_inputs_that_require_a_gradient(peer: str) -> None:
    inputs = reals(3, 2, 4, 4).requires_grad_()
    assert_served(peer, small_convnet(), inputs)
    assert inputs.grad is None


def test_serves_under_no_grad(peer: str) -> None:
    with torch.no_grad():
        assert_served(peer, small_convnet(), reals(3, 2, 4, 4))


def test_serves_checkpointing(peer: str) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.b(checkpoint(self.a, x, use_reentrant=False))

    block = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    assert_served(peer, Custom(forward, a=block, b=nn.Linear(4, 2)), reals(3, 4))


def test_a_hook_of_the_user_may_replace_an_output(peer: str) -> None:
    model = small_convnet()
    model[0].register_forward_hook(lambda module, args, output: 3 * output)
    model[3].register_forward_pre_hook(lambda module, args: (2 * args[0],))
    model[5].register_forward_hook(lambda module, args, output: output.mul_(2))
    assert_served(peer, model, reals(3, 2, 4, 4))


def test_rows_share_no_memory(peer: str) -> None:
    # The biases of layers side by side have the same δ as gradient.
    model = Custom(lambda self, x: self.a(x) + self.b(x), a=nn.Linear(4, 2), b=nn.Linear(4, 2))
    rows = persample.make_source(peer, model, squared_error, check="never").per_sample(reals(3, 4), reals(3, 2))
    before = rows["b.bias"].clone()
    rows["a.bias"].zero_()
    assert torch.equal(rows["b.bias"], before)


def test_float32_and_bfloat16_keep_their_dtype(peer: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = small_convnet().to(dtype)
        inputs, targets = reals(3, 2, 4, 4).to(dtype), reals(3, 3).to(dtype)
        source = persample.make_source(peer, model, squared_error)
        moments, rows = source.moments(inputs, targets), source.per_sample(inputs, targets)
        for values in (moments.mean, moments.second_moment, rows):
            assert all(value.dtype == dtype for value in values.values())


def test_serves_under_autocast(peer: str) -> None:
    model = small_convnet().float()
    inputs, targets = reals(3, 2, 4, 4).float(), reals(3, 3).float()
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        rows = persample.make_source(peer, model, squared_error, check="always").per_sample(inputs, targets)
    assert all(g.dtype == torch.float32 for g in rows.values())


def _with_overridden_forward() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.forward = lambda x: 2 * F.linear(x, layer.weight, layer.bias)  # type: ignore[method-assign]
    return layer


class _Scaled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class _Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (_with_overridden_forward, "'0' has its own forward"),
        (lambda: _Scaled(4, 4), "_Scaled '0' is a subclass"),
        (_Bare, "_Bare '0' has parameters"),
        (lambda: parametrizations.weight_norm(nn.Linear(4, 4)), "ParametrizedLinear '0'"),
        (lambda: prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.5), "weight_orig.*pruning"),
        pytest.param(
            lambda: weight_norm(nn.Linear(4, 4)),
            "weight_g, weight_v",
            marks=pytest.mark.filterwarnings("ignore::FutureWarning"),
        ),
    ],
)
def test_refuses_what_only_looks_like_a_known_layer(rules: str, make: Callable[[], nn.Module], match: str) -> None:
    assert_refused(rules, nn.Sequential(make(), nn.Linear(4, 2)).double(), reals(3, 4), match)


@pytest.mark.parametrize(
    "layer",
    [nn.LSTM(4, 4, batch_first=True), nn.GRU(4, 4), nn.RNN(4, 4, batch_first=True), nn.MultiheadAttention(4, 2)],
)
def test_refuses_recurrent_layers_and_attention(peer: str, layer: nn.Module) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.layer(x, x, x)[0] if isinstance(layer, nn.MultiheadAttention) else self.layer(x)[0]

    assert_refused(peer, Custom(forward, layer=layer), reals(3, 5, 4), f"{type(layer).__name__} 'layer'")


@pytest.mark.parametrize(
    ("forward", "match"),
    [
        (lambda self, x: F.linear(self.a(x), self.a.weight), "'a.weight' is used outside"),
        (lambda self, x: self.a(x) * self.a.bias, "'a.bias' is used outside"),
        (lambda self, x: self.a.forward(x), "'a.weight' is used outside|'a.bias' is used outside"),
        (lambda self, x: self.a(x.transpose(0, 1)).transpose(0, 1), "shape"),
        (lambda self, x: self.a(x.flatten(0, 1)).unflatten(0, (3, 5)), "shape"),
        (lambda self, x: self.a(x.mean(0, keepdim=True)) + x, "shape"),
    ],
)
def test_refuses_uses_that_the_rules_do_not_see(peer: str, forward: Callable[..., Tensor], match: str) -> None:
    assert_refused(peer, Custom(forward, a=nn.Linear(4, 4)), reals(3, 5, 4), match)


@pytest.mark.parametrize("method", ["moments", "per_sample"])
def test_the_self_check_finds_a_time_first_layout_of_as_many_steps_as_samples(peer: str, method: str) -> None:
    # Its shapes are those of a batch, so that only the numbers can show it.
    model = Custom(lambda self, x: self.a(x.transpose(0, 1)).transpose(0, 1), a=nn.Linear(4, 4))
    source = persample.make_source(peer, model, squared_error)
    with pytest.raises(PersampleError, match=r"wrong on this model|dim 0"):
        getattr(source, method)(reals(5, 5, 4), reals(5, 5, 4))


def test_refuses_an_input_that_is_changed_in_place_after_the_call(peer: str) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        h = x.clone()
        y = self.a(h)
        h.zero_()
        return y

    # Plain autograd cannot do this either, so there is no loop to compare with.
    model = Custom(forward, a=nn.Linear(4, 2))
    inputs = reals(3, 4)
    targets = targets_for(model, inputs)
    with no_trace(model, inputs), pytest.raises((UnsupportedModelError, RuntimeError), match=r"in.?place"):
        persample.make_source(peer, model, squared_error, check="never").per_sample(inputs, targets)


class _FailsBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        raise ZeroDivisionError("mine")


@pytest.mark.parametrize("where", ["forward", "loss", "backward"])
@pytest.mark.parametrize("method", ["moments", "per_sample"])
def test_errors_of_the_user_pass_through_and_leave_no_trace(peer: str, where: str, method: str) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        h = self.a(x)
        if where == "forward":
            raise ZeroDivisionError("mine")
        return self.b(_FailsBackward.apply(h) if where == "backward" else h)

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        if where == "loss":
            raise ZeroDivisionError("mine")
        return squared_error(outputs, targets)

    model = Custom(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 2))
    inputs, targets = reals(3, 4), reals(3, 2)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    source = persample.make_source(peer, model, loss_fn)
    with no_trace(model, inputs, targets), pytest.raises(ZeroDivisionError, match="mine"):
        getattr(source, method)(inputs, targets)


def test_attributes_of_the_user_that_the_packages_use_too_stay(peer: str) -> None:
    model = small_convnet()
    for module in model.modules():
        module.activations, module.output, module.input0 = [1], "mine", "mine"  # type: ignore[assignment]
    for parameter in model.parameters():
        parameter.grad_batch = parameter.grad_sample = parameter.sum_grad_squared = "mine"  # type: ignore[attr-defined]
    assert_served(peer, model, reals(3, 2, 4, 4))


def test_several_threads_with_several_models(peer: str) -> None:
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            generator = generator_of(seed)
            model = small_convnet()
            inputs = torch.randn(3, 2, 4, 4, dtype=torch.float64, generator=generator)
            targets = torch.randn(3, 3, dtype=torch.float64, generator=generator)
            expected = persample.make_source("loop", model, squared_error).moments(inputs, targets)
            for _ in range(5):
                moments = persample.make_source(peer, model, squared_error, check="never").moments(inputs, targets)
                for name, value in expected.second_moment.items():
                    torch.testing.assert_close(moments.second_moment[name], value, rtol=1e-9, atol=1e-12)
        except BaseException as failure:  # noqa: BLE001 - the main thread raises it
            failures.append(failure)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
