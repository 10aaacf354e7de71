"""Models and losses that differentiate: by their inputs, by their own parameters, by `torch.func`, and in hooks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import persample
from persample.errors import UnsupportedModelError
from persample.testing.devices import on_cuda
from persample.testing.zoo.case import Net, parameter


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def mlp(inputs: int, outputs: int, activation: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, 5), activation(), nn.Linear(5, outputs))


def derivative(values: Tensor, by: Tensor, **options: Any) -> Tensor:
    """The gradient of the sum of `values`, of which each sample's depend on its own entries of `by`."""
    return torch.autograd.grad(values.sum(), by, **({"create_graph": True} | options))[0]


# By inputs.


def heat_equation(model: Any, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    u = model.net(x)
    slope = derivative(u, x)
    curvature = derivative(slope[:, 0], x)
    return slope[:, 1:] - curvature[:, :1]


def energy_and_forces(model: Any, x: Tensor) -> Tensor:
    with torch.enable_grad():
        x = x.detach().clone()
        x.requires_grad = True
        energy = model.net(x).sum((1, 2))
        return torch.cat([energy[:, None], -derivative(energy, x, retain_graph=True).flatten(1)], 1)


def gradient_penalty(model: Any, x: Tensor) -> Tensor:
    features = model.table(x)
    score = model.net(features).sum((1, 2))
    return torch.stack([score, derivative(score, features).flatten(1).norm(dim=1)], 1)


def weighted_by_slopes(model: Any, x: Tensor) -> Tensor:
    """The slopes are constants."""
    x = x.detach().requires_grad_()
    u = model.net(x)
    return u * derivative(u, x, create_graph=False, retain_graph=True)


def divergence(model: Any, x: Tensor) -> Tensor:
    """As continuous normalising flows have it: all rows of the Jacobian at once."""
    x = x.detach().requires_grad_()
    vectors = torch.eye(2, dtype=x.dtype).unsqueeze(1).expand(2, len(x), 2)
    (rows,) = torch.autograd.grad(model.net(x), x, vectors, create_graph=True, is_grads_batched=True)
    return rows.diagonal(dim1=0, dim2=2)


def divergence_of_some(model: Any, x: Tensor) -> Tensor:
    """The same, where one of the tensors is not reached."""
    x, y = x.detach().requires_grad_(), x.detach().requires_grad_()
    vectors = (torch.eye(2, dtype=x.dtype).unsqueeze(1).expand(2, len(x), 2),)
    rows, none = torch.autograd.grad(
        [model.net(x)], [x, y], vectors, create_graph=True, is_grads_batched=True, allow_unused=True
    )
    assert none is None
    return rows.diagonal(dim1=0, dim2=2)


def product_with_the_hessian(model: Any, x: Tensor) -> Tensor:
    point = x.detach().requires_grad_()
    slope = torch.autograd.grad(model.net(point), point, torch.ones(len(x), 1, dtype=x.dtype), create_graph=True)[0]
    return derivative(slope * x, point)


def steps_downhill(model: Any, x: Tensor) -> Tensor:
    """What the model differentiates is no input."""
    z = torch.zeros(len(x), 2, dtype=x.dtype).requires_grad_()
    for _ in range(3):
        z = z - 0.1 * derivative(model.net(torch.cat([x, z], 1)), z)
    return z


def contrastive_divergence(model: Any, x: Tensor) -> Tensor:
    """Gradients that nothing is differentiated through."""
    z = x.detach()
    for _ in range(3):
        z = z.detach().requires_grad_()
        z = z - 0.1 * derivative(model.net(z), z, create_graph=False)
    return model.net(x) - model.net(z.detach())


def functional_jacobian(model: Any, x: Tensor) -> Tensor:
    return torch.stack(
        [torch.autograd.functional.jacobian(model.net, point, create_graph=True).flatten() for point in x]
    )


def forces_chosen_by_value(model: Any, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    energy = model.net(x)
    return derivative(energy if energy.sum().item() < 1e9 else 2 * energy, x)


def forces_of_a_recurrent_network(model: Any, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    return derivative(model.rnn(x)[0].sum((1, 2)), x).flatten(1)


# By parameters of the model's own: a task is a sample.


def inner_step(model: Any, xs: Tensor, ys: Tensor, queries: Tensor, **options: Any) -> Tensor:
    out = []
    for x, y, query in zip(xs, ys, queries, strict=True):
        out.append(query @ (model.weight - 0.1 * derivative((x @ model.weight - y).square(), model.weight, **options)))
    return torch.stack(out)


def first_order_step(model: Any, *task: Tensor) -> Tensor:
    return inner_step(model, *task, create_graph=False)


def step_with_an_unused_parameter(model: Any, xs: Tensor, ys: Tensor, queries: Tensor) -> Tensor:
    out = []
    for x, y, query in zip(xs, ys, queries, strict=True):
        loss = F.mse_loss(x @ model.weight, y)
        slope, none = torch.autograd.grad(loss, (model.weight, model.bias), create_graph=True, allow_unused=True)
        weight = model.weight if slope is None else model.weight - 0.1 * slope
        out.append(query @ weight + (model.bias if none is None else model.bias - none))
    return torch.stack(out)


def two_steps_of_a_network(model: Any, xs: Tensor, ys: Tensor, queries: Tensor) -> Tensor:
    out = []
    for x, y, query in zip(xs, ys, queries, strict=True):
        state = dict(model.net.named_parameters())
        for _ in range(2):
            slopes = torch.autograd.grad(
                F.mse_loss(functional_call(model.net, state, (x,)), y), list(state.values()), create_graph=True
            )
            state = {name: p - 0.1 * g for (name, p), g in zip(state.items(), slopes, strict=True)}
        out.append(functional_call(model.net, state, (query,)))
    return torch.stack(out)


def steps_by_torch_func(model: Any, xs: Tensor, ys: Tensor, queries: Tensor) -> Any:
    def one(x: Tensor, y: Tensor, query: Tensor) -> Any:
        state = dict(model.net.named_parameters())
        slopes = grad(lambda p: F.mse_loss(functional_call(model.net, p, (x,)), y))(state)
        return functional_call(model.net, {name: p - 0.1 * slopes[name] for name, p in state.items()}, (query,))

    return vmap(one)(xs, ys, queries)


def slope_of_a_penalty(model: Any, x: Tensor) -> Tensor:
    return x * derivative(model.weight.square().sum().sin(), model.weight)


# By transforms of torch.func.


def ensemble(model: Any, x: Tensor) -> Any:
    return vmap(lambda weight: x @ weight)(model.weights).transpose(0, 1)


def ensemble_of_layers(model: Any, x: Tensor) -> Any:
    state = {"weight": model.weights.mT, "bias": model.biases}
    return vmap(lambda one: functional_call(model.layer, one, (x,)))(state).transpose(0, 1)


def sines_of_samples(model: Any, x: Tensor) -> Any:
    return model.net(vmap(torch.sin)(x))


def hessians(model: Any, x: Tensor) -> Any:
    state = dict(model.net.named_parameters())
    return vmap(hessian(lambda point: functional_call(model.net, state, (point,)).sum()))(x).flatten(1)


def jacobians_backward(model: Any, x: Tensor) -> Any:
    return vmap(jacrev(model.net))(x).flatten(1)


def jacobians_forward(model: Any, x: Tensor) -> Any:
    return vmap(jacfwd(model.net))(x).flatten(1)


def tangents(model: Any, x: Tensor) -> Any:
    return jvp(model.net, (x,), (torch.ones_like(x),))[1]


def cotangents(model: Any, x: Tensor) -> Any:
    outputs, pull_back = vjp(model.net, x)
    return pull_back(torch.ones_like(outputs))[0]


# In a hook.


def equilibrium(
    model: Any, x: Tensor, tolerance: float | None = None, once: bool = False, dropout: float = 0.0
) -> Tensor:
    """A deep equilibrium model: the gradient is solved for in a hook, by backward passes through the same layers.

    Args:
        model: it has the layers.
        x: its inputs.
        tolerance: the change at which the solver ends, so that its steps depend on values.
        once: whether the hook removes itself when it is called, as that of the original code.
        dropout: of the state, the same in all steps.
    """
    kept = F.dropout(torch.ones_like(x), dropout) if dropout else 1

    def layer(z: Tensor) -> Tensor:
        return (kept * model.inner(z) + model.outer(x)).tanh()

    def fixed_point(step: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
        for _ in range(60):
            following = step(start)
            if tolerance is not None and (following - start).abs().max() < tolerance:
                break
            start = following
        return start

    with torch.no_grad():
        z = fixed_point(layer, torch.zeros_like(x))
    z = layer(z)
    if z.requires_grad:
        point = z.detach().requires_grad_()
        image = layer(point)

        def solve(delta: Tensor) -> Tensor:
            if once:
                handle.remove()
            return fixed_point(lambda v: delta + torch.autograd.grad(image, point, v, retain_graph=True)[0], delta)

        handle = z.register_hook(solve)
    return z


def equilibrium_by_tolerance(model: Any, x: Tensor) -> Tensor:
    return equilibrium(model, x, tolerance=1e-13)


def equilibrium_by_a_hook_for_once(model: Any, x: Tensor) -> Tensor:
    return equilibrium(model, x, tolerance=1e-13, once=True)


@dataclass
class Situation:
    """A model, the shapes of its inputs without the samples, and the backends that must serve it exactly."""

    function: Callable[..., Any]
    parts: Callable[[], dict[str, Any]]
    shapes: tuple[tuple[int, ...], ...]
    by: tuple[str, ...] = ("vmap",)
    vocabulary: int = 0

    def batch(self) -> Any:
        if self.vocabulary:
            return torch.randint(self.vocabulary, (4, *self.shapes[0]))
        tensors = tuple(torch.randn(4, *shape).double() for shape in self.shapes)
        return tensors if len(tensors) > 1 else tensors[0]


NET = ("vmap",)
TASKS = ((5, 3), (5, 2), (2, 3))
RECURRENT = Situation(forces_of_a_recurrent_network, lambda: {"rnn": nn.LSTM(3, 4, batch_first=True)}, ((5, 3),), ())
SITUATIONS = [
    Situation(heat_equation, lambda: {"net": mlp(2, 1)}, ((2,),)),
    Situation(energy_and_forces, lambda: {"net": mlp(3, 1, nn.SiLU)}, ((6, 3),)),
    Situation(gradient_penalty, lambda: {"table": nn.Embedding(6, 3), "net": mlp(3, 1)}, ((5,),), vocabulary=6),
    Situation(weighted_by_slopes, lambda: {"net": mlp(2, 2)}, ((2,),)),
    Situation(divergence, lambda: {"net": mlp(2, 2)}, ((2,),)),
    Situation(divergence_of_some, lambda: {"net": mlp(2, 2)}, ((2,),)),
    Situation(product_with_the_hessian, lambda: {"net": mlp(2, 1)}, ((2,),)),
    Situation(steps_downhill, lambda: {"net": mlp(5, 1)}, ((3,),)),
    Situation(contrastive_divergence, lambda: {"net": mlp(2, 1)}, ((2,),)),
    Situation(functional_jacobian, lambda: {"net": mlp(2, 2)}, ((2,),), ("vmap", "fused")),
    Situation(forces_chosen_by_value, lambda: {"net": mlp(2, 1)}, ((2,),), ()),
    *(() if on_cuda() else (RECURRENT,)),  # cuDNN has no second derivatives
    Situation(inner_step, lambda: {"weight": parameter(3, 2)}, TASKS),
    Situation(first_order_step, lambda: {"weight": parameter(3, 2)}, TASKS),
    Situation(step_with_an_unused_parameter, lambda: {"weight": parameter(3, 2), "bias": parameter(2)}, TASKS),
    Situation(two_steps_of_a_network, lambda: {"net": mlp(3, 2)}, TASKS),
    Situation(steps_by_torch_func, lambda: {"net": mlp(3, 2)}, TASKS),
    Situation(slope_of_a_penalty, lambda: {"weight": parameter(3)}, ((3,),), ("vmap", "fused")),
    Situation(ensemble, lambda: {"weights": parameter(2, 3, 4)}, ((3,),), ("vmap", "fused")),
    Situation(
        ensemble_of_layers,
        lambda: {
            "weights": parameter(2, 3, 4),
            "biases": parameter(2, 4),
            "layer": nn.Linear(3, 4).requires_grad_(False),
        },
        ((3,),),
    ),
    Situation(sines_of_samples, lambda: {"net": mlp(2, 2)}, ((2,),), ("vmap", "fused", "hooks")),
    Situation(hessians, lambda: {"net": mlp(2, 1)}, ((2,),)),
    Situation(jacobians_backward, lambda: {"net": mlp(2, 2)}, ((2,),)),
    Situation(jacobians_forward, lambda: {"net": mlp(2, 2)}, ((2,),)),
    Situation(tangents, lambda: {"net": mlp(2, 2)}, ((2,),)),
    Situation(cotangents, lambda: {"net": mlp(2, 2)}, ((2,),)),
    Situation(
        equilibrium,
        lambda: {"inner": nn.Linear(4, 4), "outer": nn.Linear(4, 4)},
        ((4,),),
        ("vmap", "fused", "hooks"),
    ),
    Situation(
        equilibrium_by_tolerance,
        lambda: {"inner": nn.Linear(4, 4), "outer": nn.Linear(4, 4)},
        ((4,),),
        ("fused", "hooks"),
    ),
    Situation(
        equilibrium_by_a_hook_for_once,
        lambda: {"inner": nn.Linear(4, 4), "outer": nn.Linear(4, 4)},
        ((4,),),
        ("fused", "hooks"),
    ),
]


def loss_fn(outputs: Tensor, _: None) -> Tensor:
    return outputs.flatten(1).sin().sum(1) + outputs.flatten(1).square().sum(1)


def model_of(situation: Situation) -> nn.Module:
    model = Net(situation.function, **situation.parts()).double()
    for p in model.parameters():
        p.data *= 0.5  # so that the equilibria exist
    return model


@pytest.mark.parametrize("check", ["first", "never"])
@pytest.mark.parametrize("situation", SITUATIONS, ids=lambda situation: situation.function.__name__)
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_exact_or_refused_in_words(
    backend: str, situation: Situation, check: Any, per_sample_truth: Any, no_trace: Any
) -> None:
    model, inputs = model_of(situation), situation.batch()
    truth = per_sample_truth(model, loss_fn, inputs, None).gradients
    source = persample.make_source(backend, model, loss_fn, check=check)
    with no_trace(model, inputs):
        if backend in ("loop", "vjp", *situation.by):
            torch.testing.assert_close(source.per_sample(inputs, None), truth, rtol=1e-8, atol=1e-10)
            moments = source.moments(inputs, None)
            second_moment = {name: g.square().mean(0) for name, g in truth.items()}
            torch.testing.assert_close(dict(moments.second_moment), second_moment, rtol=1e-8, atol=1e-10)
            return
        try:
            found = source.per_sample(inputs, None)
        except UnsupportedModelError as refusal:
            assert "'vjp'" in str(refusal)  # noqa: PT017 - it may also be exact
        else:
            torch.testing.assert_close(found, truth, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("situation", SITUATIONS, ids=lambda situation: situation.function.__name__)
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_explained_as_it_is_served(backend: str, situation: Situation) -> None:
    model, inputs = model_of(situation), situation.batch()
    explained = persample.explain(model, inputs, None, loss_fn, backend=backend)
    try:
        persample.make_source(backend, model, loss_fn).moments(inputs, None)
    except UnsupportedModelError as refusal:
        assert not explained.supported, refusal  # noqa: PT017
    else:
        assert explained.supported, explained


@pytest.mark.parametrize("situation", SITUATIONS, ids=lambda situation: situation.function.__name__)
@pytest.mark.parametrize("backend", ["vmap", "vjp", "fused", "hooks"])
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_recorded_exactly_or_refused(backend: str, situation: Situation, per_sample_truth: Any) -> None:
    model, inputs = model_of(situation), situation.batch()
    truth = per_sample_truth(model, loss_fn, inputs, None).gradients
    source = persample.make_source(backend, model, loss_fn)
    try:
        with source.recording() as recorded:
            loss_fn(model(*inputs) if isinstance(inputs, tuple) else model(inputs), None).mean().backward()
    except UnsupportedModelError as refusal:
        assert "'vjp'" in str(refusal)  # noqa: PT017
        return
    second_moment = {name: g.square().mean(0) for name, g in truth.items()}
    torch.testing.assert_close(dict(recorded.moments().second_moment), second_moment, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("check", ["first", "never"])
@pytest.mark.parametrize("tolerance", [None, 1e-13])
@pytest.mark.parametrize("backend", ["loop", "vjp", "fused", "hooks"])
def test_hooks_for_once_in_passes_that_draw_random_numbers(backend: str, tolerance: float | None, check: Any) -> None:
    def forward(model: Any, x: Tensor) -> Tensor:
        return equilibrium(model, x, tolerance=tolerance, once=True, dropout=0.3)

    model = Net(forward, inner=nn.Linear(4, 4), outer=nn.Linear(4, 4)).double()
    model.inner.weight.data *= 0.5
    x = torch.randn(11, 4).double()  # more than a chunk of vjp
    parameters, rows = dict(model.named_parameters()), []
    for i in range(len(x)):
        torch.manual_seed(1)
        rows.append(torch.autograd.grad(loss_fn(model(x), None)[i], list(parameters.values())))
    drawn = torch.get_rng_state()
    torch.manual_seed(1)
    found = persample.make_source(backend, model, loss_fn, check=check).per_sample(x, None)
    assert torch.equal(torch.get_rng_state(), drawn), "as after one pass"
    for name, expected in zip(parameters, zip(*rows, strict=True), strict=True):
        torch.testing.assert_close(found[name], torch.stack(expected))


@pytest.mark.parametrize("once", [False, True])
@pytest.mark.parametrize("tolerance", [None, 1e-13])
@pytest.mark.parametrize("backend", ["loop", "vjp", "fused", "hooks"])
def test_hooks_of_the_model_on_its_outputs_while_recording(
    backend: str, tolerance: float | None, once: bool, per_sample_truth: Any
) -> None:
    """What looks at the loss before the backward pass leaves them as they are."""

    def forward(model: Any, x: Tensor) -> Tensor:
        return equilibrium(model, x, tolerance=tolerance, once=once)

    model, x = Net(forward, inner=nn.Linear(4, 4), outer=nn.Linear(4, 4)).double(), torch.randn(4, 4).double()
    model.inner.weight.data *= 0.5
    truth = per_sample_truth(model, loss_fn, x, None).gradients
    with persample.make_source(backend, model, loss_fn).recording() as recorded:
        loss_fn(model(x), None).sum().div(4).backward()
    moments = recorded.moments()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, truth[name].mean(0), rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(moments.second_moment[name], truth[name].square().mean(0), rtol=1e-8, atol=1e-10)


# Backward passes that are not torch.autograd.grad.


def own_backward(model: Any, x: Tensor, **options: Any) -> Tensor:
    x = x.detach().requires_grad_()
    model.net(x).sum().backward(**options)
    return model.net(x) * x.grad


def backward_by_inputs(model: Any, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    model.net(x).sum().backward(inputs=[x])
    return model.net(x) * x.grad


@pytest.mark.parametrize("backend", ["loop", "vjp", "vmap"])
def test_backward_in_the_forward_pass_is_refused_for_what_it_adds_to_the_parameters(backend: str) -> None:
    model = Net(own_backward, net=mlp(2, 2)).double()
    with pytest.raises(UnsupportedModelError, match=r"calls .backward\(\) in the forward pass.*torch.autograd.grad"):
        persample.make_source(backend, model, loss_fn).moments(torch.randn(4, 2).double(), None)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("backend", ["loop", "vjp"])
def test_backward_by_inputs_is_served(backend: str, per_sample_truth: Any) -> None:
    model, x = Net(backward_by_inputs, net=mlp(2, 2)).double(), torch.randn(4, 2).double()
    truth = per_sample_truth(model, loss_fn, x, None).gradients
    torch.testing.assert_close(persample.make_source(backend, model, loss_fn).per_sample(x, None), truth)


def backward_in_a_hook(model: Any, x: Tensor) -> Tensor:
    """Gives the parameters a gradient beside that of the losses."""
    hidden = model.net(x)
    if hidden.requires_grad:
        other = model.net(x.sin())

        def hook(delta: Tensor) -> None:
            other.backward(delta, retain_graph=True)

        hidden.register_hook(hook)
    return hidden


@pytest.mark.parametrize("check", ["first", "never"])
@pytest.mark.parametrize("backend", ["loop", "vjp", "fused"])
def test_backward_in_a_hook_is_refused(backend: str, check: Any) -> None:
    model = Net(backward_in_a_hook, net=mlp(2, 2)).double()
    source = persample.make_source(backend, model, loss_fn, check=check)
    with pytest.raises(UnsupportedModelError, match="backward pass inside the backward pass"):
        source.per_sample(torch.randn(4, 2).double(), None)
