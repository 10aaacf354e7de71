"""What every backend promises: what it accepts, what it refuses by name, what it leaves as it was."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import persample
from persample import losses
from persample.errors import (
    BatchError,
    DisagreementError,
    LossError,
    NonFiniteLossError,
    OptionError,
    UnsupportedModelError,
)

Method = Literal["moments", "per_sample"]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["moments", "per_sample"])
def method(request: pytest.FixtureRequest) -> Any:
    return request.param


def mlp(*middle: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), *middle, nn.Linear(4, 2)).double()


def batch(size: int = 5) -> tuple[Tensor, Tensor]:
    return torch.randn(size, 3).double(), torch.arange(size) % 2


def make(backend: str, model: nn.Module, loss_fn: Any = losses.cross_entropy, **options: Any) -> Any:
    if backend == "vmap":
        options = {"randomness": "different"} | options
    return persample.make_source(backend, model, loss_fn, **options)


def assert_true(result: Any, truth: Any, **tolerances: float) -> None:
    """Compare moments or per-sample gradients with the truth."""
    if isinstance(result, persample.Moments):
        torch.testing.assert_close(result.losses, truth.losses, **tolerances)
        mean = {name: g.mean(0) for name, g in truth.gradients.items()}
        second_moment = {name: g.square().mean(0) for name, g in truth.gradients.items()}
        torch.testing.assert_close(dict(result.mean), mean, **tolerances)
        torch.testing.assert_close(dict(result.second_moment), second_moment, **tolerances)
    else:
        torch.testing.assert_close(result, truth.gradients, **tolerances)


class NeverRun(nn.Module):
    """Shows that a refusal comes before anything is computed."""

    def forward(self, x: Tensor) -> Tensor:
        pytest.fail("the model was run before it was refused")


# Models that no backend can serve.


@pytest.mark.parametrize(
    ("module", "reason", "advice"),
    [
        (nn.BatchNorm1d(4), "BatchNorm1d '3.0' is in training mode", "eval"),
        (nn.BatchNorm1d(4, track_running_stats=False).eval(), "'3.0' has track_running_stats=False", "GroupNorm"),
        (nn.SyncBatchNorm(4), "SyncBatchNorm '3.0' is in training mode", "GroupNorm"),
        (nn.Embedding(4, 4, max_norm=1.0), "Embedding '3.0' has max_norm=1.0", "max_norm=None"),
        (nn.Embedding(4, 4, scale_grad_by_freq=True), "'3.0' has scale_grad_by_freq=True", "scale_grad_by_freq=False"),
        (nn.LazyLinear(4), "'3.0.weight' is not initialised", "forward pass"),
        (nn.Linear(4, 4, dtype=torch.complex128), "Parameter '3.0.weight' is complex", "two real parameters"),
    ],
)
def test_impossible_models_are_refused_before_they_run(
    backend: str, method: Method, module: nn.Module, reason: str, advice: str, no_trace: Any
) -> None:
    model = nn.Sequential(NeverRun(), nn.Linear(3, 4), nn.Tanh(), nn.Sequential(module))
    inputs, targets = batch()
    with pytest.raises(UnsupportedModelError) as refusal, no_trace(model, inputs, targets):
        getattr(make(backend, model), method)(inputs, targets)
    assert reason in str(refusal.value)
    assert advice in str(refusal.value)


def test_models_without_values_are_refused(backend: str, method: Method) -> None:
    model = mlp(nn.Linear(4, 4, device="meta"))
    with pytest.raises(UnsupportedModelError, match=r"'2.weight' is on the meta device.*to_empty"):
        getattr(make(backend, model), method)(*batch())


def test_mode_counts_when_a_call_is_made(backend: str, method: Method) -> None:
    model = mlp(nn.BatchNorm1d(4).double()).eval()
    source = make(backend, model)
    model.train()
    with pytest.raises(UnsupportedModelError, match="BatchNorm1d '2'"):
        getattr(source, method)(*batch())


class Quadratic(nn.Module):
    """A layer that no backend can have heard of."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4).double())

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x * x


def test_unknown_layers_are_right_or_refused_by_name(backend: str, method: Method, per_sample_truth: Any) -> None:
    model, (inputs, targets) = mlp(Quadratic()), batch()
    try:
        result = getattr(make(backend, model), method)(inputs, targets)
    except UnsupportedModelError as refusal:
        assert "'2" in str(refusal) or "Quadratic" in str(refusal)  # noqa: PT017
    else:
        assert_true(result, per_sample_truth(model, losses.cross_entropy, inputs, targets))


# Models and losses that mix the samples.


class Applied(nn.Module):
    """A function as a layer, with dropout behind it or not."""

    def __init__(self, function: Callable[[Tensor], Tensor], dropout: bool) -> None:
        super().__init__()
        self.function = function
        self.dropout = nn.Dropout(0.5 if dropout else 0.0)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.dropout(self.function(x))
        return output


MIXING: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax over the batch": lambda x: x.softmax(0),
    "mean of the batch": lambda x: x - x.mean(0),
    "batch normalisation as a function": lambda x: F.batch_norm(x, None, None, training=True),
    "maximum of the batch": lambda x: x / x.abs().max(),
    "order of the batch": lambda x: x.flip(0),
    "sum so far": lambda x: x.cumsum(0),
    "size of the batch": lambda x: x / len(x),
}


@pytest.mark.parametrize("dropout", [False, True], ids=["deterministic", "dropout"])
@pytest.mark.parametrize("name", MIXING)
def test_models_that_mix_the_samples_are_refused(
    backend: str, method: Method, name: str, dropout: bool, no_trace: Any
) -> None:
    model, (inputs, targets) = mlp(Applied(MIXING[name], dropout)), batch()
    source = make(backend, model)
    with pytest.raises((UnsupportedModelError, DisagreementError)), no_trace(model, inputs, targets):
        getattr(source, method)(inputs, targets)


@pytest.mark.parametrize("dropout", [0.0, 0.5], ids=["deterministic", "dropout"])
def test_time_first_transformers_that_are_fed_batch_first_are_refused(
    backend: str, method: Method, dropout: float
) -> None:
    model = nn.Sequential(nn.TransformerEncoderLayer(4, 2, 5, dropout=dropout), nn.Linear(4, 2)).double()
    inputs, targets = torch.randn(5, 3, 4).double(), torch.randn(5, 3, 2).double()
    source = make(backend, model, losses.gaussian)
    with pytest.raises((UnsupportedModelError, DisagreementError)):
        getattr(source, method)(inputs, targets)


@pytest.mark.parametrize("dropout", [False, True], ids=["deterministic", "dropout"])
@pytest.mark.parametrize(
    "loss_fn",
    [
        lambda outputs, targets: F.cross_entropy(outputs, targets, reduction="none") / len(outputs),
        lambda outputs, targets: F.cross_entropy(outputs, targets, reduction="none").softmax(0),
        lambda outputs, targets: F.cross_entropy(outputs, targets).expand(len(outputs)),
    ],
    ids=["divided by the size", "softmax over the batch", "the mean for every sample"],
)
def test_losses_that_mix_the_samples_are_refused(backend: str, method: Method, loss_fn: Any, dropout: bool) -> None:
    model = mlp(nn.Dropout(0.5 if dropout else 0.0))
    with pytest.raises((UnsupportedModelError, DisagreementError)):
        getattr(make(backend, model, loss_fn), method)(*batch())


# Losses that are no vector of B numbers.


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (F.cross_entropy, r"scalar.*reduction='none'"),
        (lambda outputs, targets: outputs.square(), r"shape \(\d, 2\).*one loss per sample"),
        (lambda outputs, targets: outputs.argmax(1), r"torch.int64"),
        (lambda outputs, targets: 0.5, r"returned float"),
    ],
)
def test_losses_of_the_wrong_shape_are_refused(
    backend: str, method: Method, loss_fn: Any, message: str, no_trace: Any
) -> None:
    model, (inputs, targets) = mlp(), batch()
    source = make(backend, model, loss_fn)
    with pytest.raises(LossError, match=f"(?s){message}"), no_trace(model, inputs, targets):
        getattr(source, method)(inputs, targets)


def test_scalar_losses_are_refused_in_the_same_words_by_all(backend: str, method: Method) -> None:
    texts = set()
    for name in ("loop", backend):
        with pytest.raises(LossError) as refusal:
            getattr(make(name, mlp(), F.cross_entropy), method)(*batch())
        texts.add(str(refusal.value))
    assert len(texts) == 1, texts


@pytest.mark.parametrize("check", ["first", "always", "never"])
def test_losses_that_are_not_finite_are_refused(backend: str, method: Method, check: str, no_trace: Any) -> None:
    model, (inputs, targets) = mlp(), batch()
    inputs[3, 1] = float("nan")
    source = make(backend, model, check=check)
    with pytest.raises(NonFiniteLossError, match=r"loss of sample 3 is nan \(1 of 5"), no_trace(model):
        getattr(source, method)(inputs, targets)


def test_losses_that_cannot_be_called_are_refused(backend: str) -> None:
    with pytest.raises(LossError, match="cannot be called"):
        make(backend, mlp(), "cross_entropy")


# Inputs that are no mini-batch.


@pytest.mark.parametrize(
    ("inputs", "targets", "message"),
    [
        (torch.zeros(0, 3), torch.zeros(0, dtype=torch.long), "no samples"),
        (torch.zeros(3, 3), torch.zeros(2, dtype=torch.long), "inputs has 3 samples, but targets has 2"),
        ((torch.zeros(3, 3), torch.zeros(2, 3)), None, r"inputs\[0\] has 3 samples, but inputs\[1\] has 2"),
        (torch.zeros(3, 3), {"a": torch.zeros(3), "b": torch.zeros(4)}, r"targets\['b'\] has 4"),
        (torch.tensor(1.0), None, "without dimensions"),
        ([torch.zeros(3, 3)], None, "of type list"),
        (3.0, None, "of type float"),
        ((), torch.zeros(3), "no tensor"),
        ({"x": 3}, torch.zeros(3), "no tensor"),
    ],
)
def test_what_is_no_batch_is_refused_before_the_model_runs(
    backend: str, method: Method, inputs: Any, targets: Any, message: str
) -> None:
    source = make(backend, nn.Sequential(NeverRun(), nn.Linear(3, 2)))
    with pytest.raises(BatchError, match=message):
        getattr(source, method)(inputs, targets)


def test_inference_mode_is_refused(backend: str, method: Method) -> None:
    source = make(backend, mlp())
    inputs, targets = batch()
    with torch.inference_mode():
        made_there = torch.zeros(5, 3).double()
        with pytest.raises(BatchError, match="inference_mode"):
            getattr(source, method)(inputs, targets)
    with pytest.raises(BatchError, match=r"inputs.clone\(\)"):
        getattr(source, method)(made_there, targets)


# Options.


def test_options_are_refused_by_name(backend: str) -> None:
    with pytest.raises(OptionError, match=rf"'{re.escape(backend)}' has no option 'speed'.*'check'"):
        persample.make_source(backend, mlp(), losses.cross_entropy, speed=11)
    with pytest.raises(OptionError, match=r"check='sometimes'.*'first', 'always', 'never'"):
        persample.make_source(backend, mlp(), losses.cross_entropy, check="sometimes")
    with pytest.raises(OptionError, match=r"of type function.*torch.nn.Module"):
        persample.make_source(backend, lambda x: x, losses.cross_entropy)  # type: ignore[arg-type]


# What every backend accepts.


class Sum(nn.Module):
    """A model of two tensors, a number and a word."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 2), nn.Linear(4, 2)

    def forward(self, x: Tensor, y: Tensor | None = None, scale: float = 1.0, *, way: str = "plus") -> Tensor:
        if y is None:
            return scale * self.left(x)
        return self.left(x) + scale * self.right(y) if way == "plus" else self.left(x) - scale * self.right(y)


@pytest.mark.parametrize(
    "arrange",
    [
        lambda x, y: x,
        lambda x, y: (x,),
        lambda x, y: (x, y),
        lambda x, y: (x, y, 0.5),
        lambda x, y: (x, None, 2.0),
        lambda x, y: {"x": x},
        lambda x, y: {"way": "minus", "y": y, "scale": 0.5, "x": x},
    ],
    ids=["tensor", "tuple of one", "tuple", "tuple with a number", "tuple with None", "dict", "dict with a word"],
)
def test_forms_of_inputs(backend: str, method: Method, arrange: Any, per_sample_truth: Any, no_trace: Any) -> None:
    model = Sum().double()
    inputs = arrange(torch.randn(5, 3).double(), torch.randn(5, 4).double())
    targets = torch.arange(5) % 2
    with no_trace(model, inputs, targets):
        result = getattr(make(backend, model), method)(inputs, targets)
    assert_true(result, per_sample_truth(model, losses.cross_entropy, inputs, targets))


@pytest.mark.parametrize(
    ("targets", "loss_fn"),
    [
        (None, lambda outputs, targets: outputs.square().sum(1)),
        (
            {"label": torch.arange(5) % 2, "weights": [torch.rand(5).double(), 3.0]},
            lambda outputs, t: t["weights"][1] * t["weights"][0] * losses.cross_entropy(outputs, t["label"]),
        ),
        ((torch.randn(5, 2).double(),), lambda outputs, t: losses.gaussian(outputs, t[0])),
        (torch.arange(5) % 2, nn.CrossEntropyLoss()),
        (torch.arange(5) % 2, nn.CrossEntropyLoss(reduction="sum", weight=torch.tensor([1.0, 3.0]).double())),
    ],
    ids=["none", "nested", "tuple", "loss module", "weighted loss module"],
)
def test_forms_of_targets(backend: str, method: Method, targets: Any, loss_fn: Any, per_sample_truth: Any) -> None:
    model, (inputs, _) = mlp(), batch()
    plain = loss_fn
    if isinstance(loss_fn, nn.CrossEntropyLoss):
        weight = loss_fn.weight

        def plain(outputs: Tensor, targets: Tensor) -> Tensor:
            return F.cross_entropy(outputs, targets, weight=weight, reduction="none")

    result = getattr(make(backend, model, loss_fn), method)(inputs, targets)
    assert_true(result, per_sample_truth(model, plain, inputs, targets))


@pytest.mark.parametrize("form", ["tuple", "dict"])
def test_forms_of_outputs(backend: str, method: Method, form: str, per_sample_truth: Any) -> None:
    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(3, 2), nn.Linear(3, 1)

        def forward(self, x: Tensor) -> Any:
            outputs = {"left": self.left(x), "right": self.right(x)}
            return outputs if form == "dict" else tuple(outputs.values())

    def loss_fn(outputs: Any, targets: Tensor) -> Tensor:
        left, right = outputs.values() if form == "dict" else outputs
        return losses.cross_entropy(left, targets) + right.square().sum(1)

    model, (inputs, targets) = TwoHeads().double(), batch()
    try:
        result = getattr(make(backend, model, loss_fn), method)(inputs, targets)
    except UnsupportedModelError:
        assert backend in ("backpack", "opacus"), "only the adapters may depend on the form of the outputs"
    else:
        assert_true(result, per_sample_truth(model, loss_fn, inputs, targets))


def test_no_grad_around_the_call_is_no_matter(backend: str, method: Method, per_sample_truth: Any) -> None:
    model, (inputs, targets) = mlp(), batch()
    with torch.no_grad():
        result = getattr(make(backend, model), method)(inputs, targets)
        assert not torch.is_grad_enabled()
    assert_true(result, per_sample_truth(model, losses.cross_entropy, inputs, targets))


def test_existing_gradients_are_neither_read_nor_changed(
    backend: str, method: Method, per_sample_truth: Any, no_trace: Any
) -> None:
    model, (inputs, targets) = mlp(), batch()
    model[0].weight.grad = torch.full_like(model[0].weight, 7.0)
    with no_trace(model, inputs, targets):
        result = getattr(make(backend, model), method)(inputs, targets)
    assert_true(result, per_sample_truth(model, losses.cross_entropy, inputs, targets))


def test_gradients_of_the_inputs_are_no_matter(
    backend: str, method: Method, per_sample_truth: Any, no_trace: Any
) -> None:
    model, (inputs, targets) = mlp(), batch()
    inputs.requires_grad_()
    with no_trace(model, inputs, targets):
        result = getattr(make(backend, model), method)(inputs, targets)
    assert_true(result, per_sample_truth(model, losses.cross_entropy, inputs, targets))


class SumOfParameters(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.change = (nn.Parameter(torch.randn(2, 3)) for _ in range(2))
        self.first, self.second = (nn.Parameter(torch.randn(2)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight + self.change) + self.first + self.second


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("backend", ["loop", "fused", "vmap"])
def test_results_may_be_changed_in_place(backend: str, method: Method, size: int, per_sample_truth: Any) -> None:
    model = SumOfParameters().double()
    inputs, targets = batch(size)
    truth = per_sample_truth(model, losses.cross_entropy, inputs, targets)
    result = getattr(make(backend, model), method)(inputs, targets)
    for values in (result.mean, result.second_moment) if isinstance(result, persample.Moments) else (result,):
        for g in values.values():
            g.mul_(3)
        for g in values.values():
            g.div_(3)
    assert_true(result, truth)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)])
def test_results_have_the_type_of_the_parameters(
    backend: str, method: Method, dtype: torch.dtype, tolerance: float, per_sample_truth: Any
) -> None:
    model, (inputs, targets) = mlp(), batch()
    truth = per_sample_truth(model, losses.cross_entropy, inputs, targets)
    result = getattr(make(backend, model.to(dtype)), method)(inputs.to(dtype), targets)
    values = result.mean if method == "moments" else result
    assert {value.dtype for value in values.values()} == {dtype}
    assert_true(result, truth, rtol=tolerance, atol=tolerance, check_dtype=False)


def test_the_weights_count_that_the_model_has_at_the_call(backend: str, method: Method, per_sample_truth: Any) -> None:
    model, (inputs, targets) = mlp(), batch()
    source = make(backend, model)
    getattr(source, method)(inputs, targets)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-0.5)
    model[0].bias.requires_grad_(False)
    result = getattr(source, method)(inputs, targets)
    assert_true(result, per_sample_truth(model, losses.cross_entropy, inputs, targets))


# What a call leaves behind.


class Remembering(nn.Module):
    """Counts its calls in a buffer and keeps what it saw in an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.inner = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen = x
        output: Tensor = self.inner(x)
        return output


def test_the_state_changes_as_in_one_forward_pass(backend: str, method: Method) -> None:
    model, (inputs, targets) = Remembering().double(), batch()
    source = make(backend, model)
    for call in (1, 2):
        getattr(source, method)(inputs, targets)
        assert int(model.calls) == call
        assert torch.equal(model.seen, inputs)


def test_hooks_of_the_user_stay_and_run(backend: str, method: Method, no_trace: Any) -> None:
    model, (inputs, targets) = mlp(), batch()
    shapes = []
    model[0].register_forward_hook(lambda module, args, output: shapes.append(output.shape))
    with no_trace(model, inputs, targets):
        getattr(make(backend, model), method)(inputs, targets)
    assert shapes


def test_training_goes_on_as_if_nothing_had_happened(backend: str, method: Method) -> None:
    model, (inputs, targets) = mlp(), batch()
    F.cross_entropy(model(inputs), targets).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    getattr(make(backend, model), method)(inputs, targets)
    model.zero_grad()
    F.cross_entropy(model(inputs), targets).backward()
    assert all(torch.equal(p.grad, e) for p, e in zip(model.parameters(), expected, strict=True))


# Threads.


def test_threads_with_models_of_their_own(backend: str, method: Method, per_sample_truth: Any) -> None:
    def net(width: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(1, width, 2), nn.ReLU(), nn.Flatten(), nn.Linear(9 * width, 4), nn.Tanh(), nn.Linear(4, 2)
        ).double()

    models = [net(1 + i) for i in range(6)]
    batches = [(torch.randn(4 + i, 1, 4, 4).double(), torch.arange(4 + i) % 2) for i in range(6)]
    truths = [per_sample_truth(model, losses.cross_entropy, *one) for model, one in zip(models, batches, strict=True)]
    sources = [make(backend, model, check="always") for model in models]

    def work(i: int) -> None:
        assert_true(getattr(sources[i], method)(*batches[i]), truths[i])

    at_the_same_time(work, 6)


def test_threads_with_dropout(backend: str, method: Method) -> None:
    """The threads share one generator of random numbers: what they draw is left to chance, but all of it is right."""
    sources = [make(backend, mlp(nn.Dropout()), check="always") for _ in range(6)]
    inputs, targets = batch()
    at_the_same_time(lambda i: getattr(sources[i], method)(inputs, targets), 6)


def at_the_same_time(work: Callable[[int], None], number: int) -> None:
    """Call `work(i)` five times in each of `number` threads, and raise what one of them raised."""
    start = threading.Barrier(number, timeout=60)
    problems: list[BaseException] = []

    def run(i: int) -> None:
        try:
            start.wait()
            for _ in range(5):
                work(i)
        except BaseException as problem:  # noqa: BLE001 - it is raised below, in the thread of the test
            problems.append(problem)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    if problems:
        raise problems[0]
    assert not any(thread.is_alive() for thread in threads)
