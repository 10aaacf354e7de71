"""What a model keeps from one forward pass to the next: after a call it is what one ordinary pass leaves, or as before.

Buffers, attributes of modules, frozen parameters that the forward pass moves, and random numbers from wherever.
"""

from __future__ import annotations

import copy
import random
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.ao import quantization

import persample
from persample import losses
from persample.errors import PersampleError, UnsupportedModelError
from persample.testing.devices import generator_of

METHODS = ("moments", "per_sample")


class Pair(NamedTuple):
    first: Tensor
    second: int


class Keeping(nn.Module):
    """Keeps something of its hidden layer in one of several ways; the outputs do not depend on that."""

    def __init__(self, keep: Callable[[Keeping, Tensor], Any]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("sized_late", torch.empty(0))
        self.calls, self.tensor, self.values = 0, torch.zeros(4), [0.0]
        self.table: dict[str, Any] = {}
        self.queue: deque[Any] = deque(maxlen=2)
        self.nested = {"inner": [torch.zeros(4)]}
        self.keep = keep
        self.double()
        self.tensor, self.nested["inner"][0] = self.tensor.double(), self.nested["inner"][0].double()

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        self.keep(self, h)
        output: Tensor = self.last(h)
        return output


def resize(model: Keeping, h: Tensor) -> None:
    if not model.sized_late.numel():
        model.sized_late.resize_(4).copy_(model.first.bias.detach())
    model.sized_late += 1


def register(model: Keeping, h: Tensor) -> None:
    if not hasattr(model, "late"):
        model.register_buffer("late", torch.zeros(4).double(), persistent=False)
        model.note = 0
    model.late += 1
    model.note += 1


def bind(name: str, value: Callable[[Keeping, Tensor], Any]) -> Callable[[Keeping, Tensor], None]:
    return lambda model, h: setattr(model, name, value(model, h))


KEEPING: dict[str, Callable[[Keeping, Tensor], Any]] = {
    "a buffer in place": lambda model, h: model.mean.mul_(0.9).add_(h.detach().mean(0)),
    "a buffer through data": lambda model, h: model.mean.data.add_(h.detach().mean(0)),
    "a buffer's data": lambda model, h: setattr(model.mean, "data", model.mean.data + 1),
    "another buffer": bind("mean", lambda model, h: 0.9 * model.mean + h.detach().mean(0)),
    "another buffer with its graph": bind("mean", lambda model, h: 0.9 * model.mean + h.mean(0)),
    "a buffer of late size": resize,
    "a buffer that is registered late": register,
    "a number": lambda model, h: setattr(model, "calls", model.calls + 1),
    "a tensor": bind("tensor", lambda model, h: model.tensor + h.detach().sum(0)),
    "a tensor of all samples": bind("tensor", lambda model, h: h.detach()),
    "a tensor with its graph": bind("tensor", lambda model, h: h),
    "a tensor in place": lambda model, h: model.tensor.add_(h.detach().sum(0)),
    "a new attribute": bind("hidden", lambda model, h: h),
    "a tuple": bind("pair", lambda model, h: Pair(h, model.calls)),
    "a list": lambda model, h: model.values.append(h),
    "a dict": lambda model, h: model.table.update(last=h, count=model.table.get("count", 0) + 1),
    "a queue": lambda model, h: model.queue.append(h),
    "a tensor in a list in a dict": lambda model, h: model.nested["inner"][0].add_(h.detach().sum(0)),
}


def contents(value: Any) -> Any:
    """What is kept, without the autograd graph."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: contents(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | deque):
        return [contents(entry) for entry in value]
    return value


def state_of(model: nn.Module) -> dict[str, Any]:
    plain = {name: value for name, value in vars(model).items() if not name.startswith("_") and name != "keep"}
    return contents({**plain, **dict(model.named_buffers()), **dict(model.named_parameters())})


def batch(size: int = 5) -> tuple[Tensor, Tensor]:
    return torch.randn(size, 3, generator=generator_of(1)).double(), torch.arange(size) % 2


def make(backend: str, model: nn.Module, **options: Any) -> Any:
    return persample.make_source(backend, model, losses.cross_entropy, **options)


def assert_true(result: Any, truth: dict[str, Tensor], tolerance: float = 1e-9) -> None:
    if isinstance(result, persample.Moments):
        mean = {name: g.mean(0) for name, g in truth.items()}
        torch.testing.assert_close(result.mean, mean, rtol=tolerance, atol=tolerance)
        squares = {name: g.square().mean(0) for name, g in truth.items()}
        torch.testing.assert_close(result.second_moment, squares, rtol=tolerance, atol=tolerance)
    else:
        torch.testing.assert_close(result, truth, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("check", ["first", "never"])
@pytest.mark.parametrize("name", KEEPING)
def test_the_state_is_that_after_ordinary_passes(
    backend: str, name: str, check: str, method: str, per_sample_truth: Any
) -> None:
    torch.manual_seed(0)
    model, (inputs, targets) = Keeping(KEEPING[name]), batch()
    ordinary = copy.deepcopy(model)
    truth = per_sample_truth(model, losses.cross_entropy, inputs, targets).gradients
    source = make(backend, model, check=check)
    for _ in range(3):
        try:
            result = getattr(source, method)(inputs, targets)
        except UnsupportedModelError:
            assert backend == "vmap"
            return
        ordinary(inputs)
        for twin in (ordinary,):  # as a training loop would detach it
            state = state_of(twin)
            twin.mean, twin.tensor = twin.mean.detach(), twin.tensor.detach()
        torch.testing.assert_close(state_of(model), state, rtol=1e-12, atol=1e-14)
        assert_true(result, truth)
    copy.deepcopy(model)  # there is no graph in it


@pytest.mark.parametrize("name", KEEPING)
def test_after_an_exception_the_state_is_as_before(backend: str, name: str, no_trace: Any) -> None:
    model, (inputs, targets) = Keeping(KEEPING[name]), batch()
    source = persample.make_source(backend, model, lambda o, t: losses.cross_entropy(o, t) * float("nan"))
    with no_trace(model), pytest.raises(PersampleError):
        source.moments(inputs, targets)


@pytest.mark.parametrize("name", KEEPING)
def test_nothing_is_kept_of_an_explanation(backend: str, name: str, no_trace: Any) -> None:
    model = Keeping(KEEPING[name])
    with no_trace(model):
        persample.explain(model, batch()[0], backend=backend)


class Counter:
    """Counts in an object that nobody looks into."""

    def __init__(self) -> None:
        self.calls = 0


def test_a_third_partys_traces_are_no_state(no_trace: Any) -> None:
    """A backend that says nothing of its state may leave what it likes: a pass is run where the state has changed."""

    class Untidy(persample.PerSampleGradSource):
        def compute_per_sample(self, batch: Any) -> Any:
            loop = persample.make_source("loop", self.model, self.loss_fn, check="never")
            found = loop.compute_per_sample(batch)
            self.losses(batch)
            for module in self.model.modules():
                module.left = torch.ones(2)
            next(self.model.parameters()).left = 1
            return found

    model, (inputs, targets) = Keeping(lambda model, h: None), batch()
    with no_trace(model, inputs, targets):
        Untidy(model, losses.cross_entropy).moments(inputs, targets)
    model = Keeping(lambda model, h: setattr(model, "calls", model.calls + 1))
    source = Untidy(model, losses.cross_entropy)
    for call in (1, 2):
        source.moments(inputs, targets)
        assert model.calls == call
        assert not hasattr(model, "left")


# States that the outputs depend on.


class Membrane(nn.Module):
    """A leaky neuron, whose potential is where the next sequence begins unless it is reset."""

    def __init__(self, detach: bool, buffer: bool) -> None:
        super().__init__()
        self.inner, self.outer, self.detach = nn.Linear(3, 4), nn.Linear(4, 2), detach
        if buffer:
            self.register_buffer("potential", torch.zeros(()))
        self.reset()
        self.double()

    def reset(self) -> None:
        self.potential = torch.zeros((), dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        out = x.new_zeros(())
        for t in range(x.shape[1]):
            self.potential = 0.9 * self.potential + self.inner(x[:, t])
            out = out + self.outer(torch.tanh(self.potential))
        if self.detach:
            self.potential = self.potential.detach()
        return out


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("buffer", [False, True])
@pytest.mark.parametrize("detach", [False, True])
def test_a_state_that_is_reset_before_each_call(
    backend: str, detach: bool, buffer: bool, method: str, per_sample_truth: Any
) -> None:
    torch.manual_seed(0)
    model, inputs, targets = Membrane(detach, buffer), torch.randn(5, 6, 3).double(), torch.arange(5) % 2
    truth = per_sample_truth(model, losses.cross_entropy, inputs, targets).gradients
    source = make(backend, model, check="always")
    for _ in range(2):
        model.reset()
        try:
            assert_true(getattr(source, method)(inputs, targets), truth)
        except UnsupportedModelError as refusal:
            assert backend.partition(" ")[0] in ("hooks", "backpack", "opacus", "vmap")
            assert "mixes" not in str(refusal)  # noqa: PT017
            return
    assert not model.potential.requires_grad


@pytest.mark.parametrize("detach", [False, True])
def test_a_state_that_is_reset_before_the_users_pass(detach: bool) -> None:
    torch.manual_seed(0)
    found, inputs, targets = [], torch.randn(5, 6, 3).double(), torch.arange(5) % 2
    for backend in ("loop", "fused"):
        torch.manual_seed(0)
        model = Membrane(detach, buffer=True)
        optimizer = persample.VOGN(model, losses.cross_entropy, data_size=100, hess_init=0.1, backend=backend)
        for _ in range(2):
            with optimizer.sampled_params(train=True):
                model.reset()
                F.cross_entropy(model(inputs), targets).backward()
                after = model.potential.detach()
            optimizer.step()
        assert torch.equal(model.potential, after)  # the user's own pass changed it, once
        found.append([*model.parameters()])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)


class Stateful(nn.Module):
    """Truncated back-propagation through time: a batch begins with the state at which the one before ended."""

    def __init__(self) -> None:
        super().__init__()
        self.cells, self.out = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 2)
        self.state: tuple[Tensor, Tensor] | None = None
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h, state = self.cells(x, self.state)
        self.state = (state[0].detach(), state[1].detach())
        output: Tensor = self.out(h[:, -1])
        return output

    def of_sample(self, i: int) -> Stateful:
        """Return a copy that holds the state of sample i alone."""
        alone = copy.deepcopy(self)
        if self.state is not None:
            alone.state = (self.state[0][:, i : i + 1], self.state[1][:, i : i + 1])
        return alone


@pytest.mark.parametrize("check", ["first", "never"])
def test_a_state_with_an_entry_for_each_sample_is_carried_on(backend: str, check: str) -> None:
    torch.manual_seed(0)
    model, inputs, targets = Stateful(), torch.randn(5, 6, 3).double(), torch.arange(5) % 2
    ordinary = copy.deepcopy(model)
    source = make(backend, model, check=check)
    for call in range(3):
        truths = []
        for i in range(5):
            alone = ordinary.of_sample(i)
            loss = losses.cross_entropy(alone(inputs[i : i + 1]), targets[i : i + 1])
            truths.append(torch.autograd.grad(loss.sum(), list(alone.parameters())))
        names = [name for name, _ in model.named_parameters()]
        truth = {name: torch.stack(rows) for name, rows in zip(names, zip(*truths, strict=True), strict=True)}
        try:
            found = source.per_sample(inputs, targets)
        except UnsupportedModelError as refusal:
            if call == 0:
                assert backend.partition(" ")[0] in ("hooks", "backpack", "opacus", "vmap")
            else:
                assert "keeps" in str(refusal)  # noqa: PT017
                assert "'state'" in str(refusal)  # noqa: PT017
                assert backend == "loop"
            return
        assert_true(found, truth)
        ordinary(inputs)
        assert torch.equal(model.state[0], ordinary.state[0])
        assert torch.equal(model.state[1], ordinary.state[1])


def test_crosscheck_lets_every_backend_begin_with_the_same_state() -> None:
    torch.manual_seed(0)
    model, inputs, targets = Stateful(), torch.randn(5, 6, 3).double(), torch.arange(5) % 2
    agreements = persample.crosscheck(model, losses.cross_entropy, inputs, targets, backends=["loop", "fused", "vjp"])
    assert [agreement.agrees for agreement in agreements] == [True, True, True]
    assert model.state is None


@pytest.mark.parametrize("look", [persample.crosscheck, persample.benchmark])
def test_nothing_is_kept_of_a_look_at_all_backends(look: Callable[..., Any], no_trace: Any) -> None:
    options: dict[str, Any] = {"rounds": 1} if look is persample.benchmark else {}
    for keep in ("a buffer in place", "a number", "a list"):
        model, (inputs, targets) = Keeping(KEEPING[keep]), batch()
        model.add_module("drops", nn.Dropout(0.5))
        model.register_forward_hook(lambda m, args, output: m.drops(output))
        drawn = torch.get_rng_state()
        with no_trace(model, inputs, targets):
            look(model, losses.cross_entropy, inputs, targets, backends=["fused"], **options)
        assert torch.equal(torch.get_rng_state(), drawn)


# Frozen parameters.


class Momentum(nn.Module):
    """Contrasts a trained encoder with a frozen one, which follows it in the forward pass, as MoCo and BYOL do."""

    def __init__(self, through_data: bool) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(3, 4), nn.Linear(3, 4).requires_grad_(False)
        self.through_data = through_data
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            for frozen, trained in zip(self.key.parameters(), self.query.parameters(), strict=True):
                if self.through_data:
                    frozen.data = frozen.data * 0.9 + trained.data * 0.1
                else:
                    frozen.mul_(0.9).add_(trained, alpha=0.1)
            keys = F.normalize(self.key(x.roll(1, -1)), dim=1)
        return 2 - 2 * (F.normalize(self.query(x), dim=1) * keys).sum(1)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("check", ["first", "always", "never"])
@pytest.mark.parametrize("through_data", [False, True])
def test_frozen_parameters_that_the_forward_pass_moves(
    backend: str, through_data: bool, check: str, method: str, per_sample_truth: Any
) -> None:
    torch.manual_seed(0)
    model, (inputs, targets) = Momentum(through_data), batch()
    ordinary = copy.deepcopy(model)
    source = persample.make_source(backend, model, lambda o, t: o, check=check)
    for _ in range(3):
        truth = per_sample_truth(ordinary, lambda o, t: o, inputs, targets).gradients
        try:
            result = getattr(source, method)(inputs, targets)
        except UnsupportedModelError:
            assert backend == "vmap"
            return
        ordinary(inputs)
        assert_true(result, truth)
        torch.testing.assert_close(model.state_dict(), ordinary.state_dict(), rtol=1e-12, atol=1e-14)


def test_frozen_parameters_are_put_back_after_an_exception(backend: str, no_trace: Any) -> None:
    model, (inputs, targets) = Momentum(through_data=False), batch()
    source = persample.make_source(backend, model, lambda o, t: o * float("nan"))
    with no_trace(model), pytest.raises(PersampleError):
        source.moments(inputs, targets)


def test_layers_that_the_forward_pass_makes_are_refused(backend: str, no_trace: Any) -> None:
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            if not hasattr(self, "last"):
                self.last = nn.Linear(2, 2)
            output: Tensor = self.last(self.first(x))
            return output

    model = Late()
    with no_trace(model), pytest.raises(UnsupportedModelError):
        make(backend, model).moments(batch()[0].float(), batch()[1])


class Replacing(nn.Module):
    """Clamps its weight by a parameter in the place of the one before."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        self.last.weight = nn.Parameter(self.last.weight.detach().clamp(-0.1, 0.1))
        output: Tensor = self.last(torch.tanh(self.first(x)))
        return output


@pytest.mark.parametrize("check", ["first", "never"])
def test_parameters_that_the_forward_pass_replaces_are_refused(backend: str, check: str, no_trace: Any) -> None:
    model = Replacing()
    with no_trace(model):
        with pytest.raises(UnsupportedModelError, match=r"'last.weight' by a new nn.Parameter.*copy_"):
            make(backend, model, check=check).moments(*batch())
        explained = str(persample.explain(model, batch()[0], backend=backend))
        assert "replaces its parameter 'last.weight' by a new nn.Parameter" in explained


# Passes that cannot be repeated.


class Unrepeatable(nn.Module):
    """Multiplies its hidden layer by something that is another number in each call."""

    def __init__(self, factor: Callable[[], float]) -> None:
        super().__init__()
        self.first, self.last, self.factor = nn.Linear(3, 4), nn.Linear(4, 2), factor
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.last(torch.tanh(self.first(x)) * self.factor())
        return output


def counting() -> Callable[[], float]:
    counter = Counter()

    def factor() -> float:
        counter.calls += 1
        return 1 + counter.calls / 10

    return factor


def drawing() -> Callable[[], float]:
    generator = np.random.default_rng(0)
    return lambda: float(generator.random())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", [counting, drawing])
def test_a_pass_that_cannot_be_repeated_is_the_reason(
    backend: str, kind: Callable[[], Any], method: str, no_trace: Any
) -> None:
    model, (inputs, targets) = Unrepeatable(kind()), batch()
    with no_trace(model, inputs, targets):
        with pytest.raises(UnsupportedModelError, match=r"change when the forward pass is repeated.* closure"):
            getattr(make(backend, model), method)(inputs, targets)
        assert "change when the forward pass is repeated" in str(persample.explain(model, inputs, backend=backend))


def test_a_pass_that_cannot_be_repeated_is_served_without_a_check(per_sample_truth: Any) -> None:
    inputs, targets = batch()
    found = make("fused", Unrepeatable(counting()), check="never")
    model = found.model
    fixed = Unrepeatable(lambda: 1.1)
    fixed.load_state_dict(model.state_dict())
    truth = per_sample_truth(fixed, losses.cross_entropy, inputs, targets).gradients
    assert_true(found.per_sample(inputs, targets), truth)


# Fake quantisation.


class Quantised(nn.Module):
    """Rounds its hidden layer and a weight to grids, as training that knows of quantisation does."""

    def __init__(self, hidden: nn.Module, weight: nn.Module) -> None:
        super().__init__()
        self.first, self.last, self.hidden, self.weight = nn.Linear(3, 4), nn.Linear(4, 2), hidden, weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.hidden(torch.tanh(self.first(x)))
        return F.linear(h, self.weight(self.last.weight), self.last.bias)


QUANTISATION = {
    "of fused kernels": (quantization.default_fused_act_fake_quant, quantization.default_fused_wt_fake_quant),
    "of tensors": (quantization.default_fake_quant, quantization.default_weight_fake_quant),
    "of channels": (
        quantization.default_per_channel_weight_fake_quant.with_args(ch_axis=1),
        quantization.default_per_channel_weight_fake_quant,
    ),
}


@pytest.mark.parametrize("observing", [False, True])
@pytest.mark.parametrize("kind", QUANTISATION)
def test_fake_quantisation(backend: str, kind: str, observing: bool, per_sample_truth: Any) -> None:
    """Served where ranges are fixed; where they are those of the batch, its samples mix."""
    torch.manual_seed(0)
    model = Quantised(*(make_one() for make_one in QUANTISATION[kind]))
    inputs, targets = torch.randn(6, 3), torch.arange(6) % 2
    model(inputs / 2)
    if not observing:
        model.apply(quantization.disable_observer)
    source = make(backend, model)
    if observing or backend.partition(" ")[0] in ("hooks", "backpack", "opacus"):
        with pytest.raises(UnsupportedModelError):
            source.per_sample(inputs, targets)
        return
    truth = per_sample_truth(model, losses.cross_entropy, inputs, targets).gradients
    try:
        assert_true(source.per_sample(inputs, targets), truth, 1e-5)
    except UnsupportedModelError:
        assert (backend, kind) == ("vmap", "of fused kernels")


# Random numbers.


class Noisy(nn.Module):
    """Adds noise to its hidden layer."""

    def __init__(self, noise: Callable[[Noisy, Tensor], Any]) -> None:
        super().__init__()
        self.first, self.last, self.noise = nn.Linear(3, 4), nn.Linear(4, 2), noise
        self.generator = generator_of(0)
        self.of_python, self.of_numpy = random.Random(0), np.random.default_rng(0)
        self.older = np.random.RandomState(0)
        self.register_buffer("eps", torch.zeros(4))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        output: Tensor = self.last(h * self.noise(self, h))
        return output


NOISE: dict[str, Callable[[Noisy, Tensor], Any]] = {
    "Python": lambda model, h: random.random(),
    "Python, for each sample": lambda model, h: torch.tensor([[random.random()] for _ in h]).double(),
    "NumPy": lambda model, h: torch.as_tensor(np.random.randn(*h.shape)),
    "PyTorch": lambda model, h: torch.randn_like(h),
    "an own generator of PyTorch": lambda m, h: torch.randn(h.shape, generator=m.generator, dtype=h.dtype),
    "an own generator of Python": lambda model, h: model.of_python.random(),
    "an own generator of NumPy": lambda model, h: torch.as_tensor(model.of_numpy.standard_normal(h.shape)),
    "an own generator of NumPy, as of old": lambda model, h: torch.as_tensor(model.older.randn(*h.shape)),
    "a buffer that noise is drawn into": lambda model, h: model.eps.data.normal_(),
}


def seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("check", ["first", "never"])
@pytest.mark.parametrize("name", NOISE)
def test_random_numbers_are_those_of_one_ordinary_pass(backend: str, name: str, check: str, method: str) -> None:
    seed_all(0)
    model, (inputs, targets) = Noisy(NOISE[name]), batch()
    ordinary = Noisy(NOISE[name])
    ordinary.load_state_dict(model.state_dict())
    source = make(backend, model, check=check)
    results = []
    for call in range(2):
        seed_all(call)
        values = losses.cross_entropy(ordinary(inputs), targets)
        rows = [torch.autograd.grad(v, list(ordinary.parameters()), retain_graph=True) for v in values]
        names = [key for key, _ in ordinary.named_parameters()]
        truth = {key: torch.stack(g) for key, g in zip(names, zip(*rows, strict=True), strict=True)}
        following = [random.random(), np.random.rand(), torch.rand(1).item()]
        seed_all(call)
        try:
            results.append(getattr(source, method)(inputs, targets))
        except UnsupportedModelError as refusal:
            assert backend == "vmap"
            assert "random" in str(refusal)  # noqa: PT017
            return
        assert_true(results[-1], truth)
        assert following == [random.random(), np.random.rand(), torch.rand(1).item()]
        torch.testing.assert_close(model.eps, ordinary.eps)
