"""A backend before its judge: what it returns for a problem is exact, or it refuses with a reason, or a test fails."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

import persample
from persample.errors import ContractError, DisagreementError, UnsupportedModelError
from persample.quantities import Gram, Norms, PerSample, Quantities, Quantity, SecondMoment, WeightedSum
from persample.sources.contract import Check
from persample.testing.devices import generator_state, set_seed
from persample.testing.problem import Problem
from persample.testing.trace import no_trace
from persample.testing.truth import Stream, Truth

Method = Literal["moments", "per_sample", "quantities"]
METHODS: tuple[Method, ...] = ("moments", "per_sample")

_CALLS: dict[str, Callable[[persample.PerSampleGradSource, Any, Any], Any]] = {
    "moments": lambda source, inputs, targets: source.moments(inputs, targets),
    "per_sample": lambda source, inputs, targets: source.per_sample(inputs, targets),
    "quantities": lambda source, inputs, targets: source.compute(inputs, targets, *asked()),
}


def asked() -> tuple[Quantity[Any], ...]:
    """Return quantities that between them ask for everything that a backend may have a shorter way to."""
    return SecondMoment(), PerSample(), Norms(per="parameter"), WeightedSum(_weights), Gram(per="parameter")


def _weights(norms: Tensor) -> Tensor:
    """Weights of both signs, of the shape of the norms."""
    return torch.linspace(-1, 2, len(norms), dtype=norms.dtype, device=norms.device)


@dataclass(frozen=True)
class Verdict:
    """How a backend served a problem, if no wrong number left it.

    Attributes:
        kind: `"exact"`; `"refused"` by an `UnsupportedModelError`; or `"caught"`: the numbers were wrong, which the
            self-check found. `BackendSuite` does not accept that.
        reason: what the error said.
    """

    kind: Literal["exact", "refused", "caught"]
    reason: str = ""


EXACT = Verdict("exact")


@dataclass(frozen=True)
class Candidate:
    """A backend as the suite makes it.

    Attributes:
        backend: its name.
        options: what `make_source` is given.
        stream: whence it takes the random numbers of dropout, see `per_sample_truth`.
    """

    backend: str
    options: Mapping[str, Any] = field(default_factory=dict)
    stream: Stream = "batch"

    def source(self, problem: Problem, check: Check = "first") -> persample.PerSampleGradSource:
        """Return the source for the model and the loss of `problem`."""
        return persample.make_source(self.backend, problem.model, problem.loss_fn, check=check, **self.options)

    def ready(self, problem: Problem, method: Method, check: Check) -> persample.PerSampleGradSource:
        """Return the source that `method` is called on, for subclasses that call it before."""
        return self.source(problem, check)

    def call(self, source: persample.PerSampleGradSource, problem: Problem, method: Method) -> Any:
        """Return what `method` returns."""
        return _CALLS[method](source, problem.inputs, problem.targets)

    def judge(self, problem: Problem, check: Check = "first") -> Verdict:
        """Call the methods, and return whether the backend was exact or refused, and why.

        Raises:
            AssertionError: a number is wrong and the self-check did not see it, the result is not what the contract
                asks for, a trace is left, other random numbers were drawn than in one forward pass, or a refusal does
                not say what to do.
        """
        truth = None if problem.impossible else problem.truth(self.stream)
        own_blocks = type(self.source(problem)).compute_blocks is not persample.PerSampleGradSource.compute_blocks
        methods = (*METHODS, "quantities") if own_blocks else METHODS
        verdicts = [self._judge_method(problem, truth, method, check) for method in methods]
        return next((verdict for verdict in verdicts if verdict != EXACT), EXACT)

    def _judge_method(self, problem: Problem, truth: Truth | None, method: Method, check: Check) -> Verdict:
        due, buffers = problem.after_one_forward_pass
        source = self.ready(problem, method, check)
        trace = no_trace(problem.model, problem.inputs, problem.targets, but_buffers=True)
        with _buffers_as_before_or(buffers, problem.model), trace, problem.autocasting():
            set_seed(problem.seed)
            try:
                result = self.call(source, problem, method)
            except ContractError as error:
                raise AssertionError(str(error)) from error
            except (UnsupportedModelError, DisagreementError) as error:
                kind: Any = "caught" if isinstance(error, DisagreementError) else "refused"
                return Verdict(kind, _actionable(str(error)))
        assert truth is not None, f"{self.backend!r} answered, but the model mixes the samples"
        if self.stream == "batch":
            drawn = generator_state()
            assert torch.equal(drawn, due), "other random numbers were drawn than in one forward pass"
        try:
            assert_right(method, result, truth, problem, {})
        except AssertionError:
            left = problem.rounding_left(self.stream)
            if not any(left.values()):
                raise
            assert_right(method, result, truth, problem, left)
        return EXACT


_ADVICE = re.compile(
    r"\b(call|change|choose|expand|give|hold|initialise|keep|leave|make|pad|pass|put|read|replace|run|set|switch|take|use|"
    r"write)\b",
    re.IGNORECASE,
)


def _actionable(reason: str) -> str:
    assert _ADVICE.search(reason), f"the refusal does not say what to do: {reason}"
    return reason


@contextmanager
def _buffers_as_before_or(due: Sequence[Tensor], model: nn.Module) -> Iterator[None]:
    """Assert that the buffers are as they were or as `due` afterwards, and put them back."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    yield
    for (buffer, value), after in zip(before, due, strict=True):
        if not torch.equal(buffer, value):
            torch.testing.assert_close(buffer, after, equal_nan=True, msg="a buffer has the value of no forward pass")
            buffer.copy_(value)


def assert_right(method: Method, result: Any, truth: Truth, problem: Problem, left: Mapping[str, float]) -> None:
    """Assert that `result` is what it should be.

    Args:
        method: which method of the source returned it.
        result: what it returned.
        truth: the gradients of the single samples.
        problem: what was asked.
        left: what rounding leaves of gradients that vanish in exact arithmetic, by name.
    """
    relative, floor, largest = _relative(problem), rounding(truth), _largest(truth.gradients)
    # Ties that last bits decide are no rounding, so what is left has a limit. The losses may vanish, too.
    most = min(1e2 * relative, 5e-2) * max(1.0, truth.losses.abs().max().item())
    left = {name: min(left.get(name, 0.0), most) for name in truth.gradients}
    if method == "per_sample":
        assert_same(result, truth.gradients, problem, floor, left)
        return
    size = len(truth.losses)
    if method == "quantities":
        _assert_right_quantities(result, truth, problem, floor, left)
        return
    assert result.batch_size == size
    assert not result.losses.requires_grad
    assert result.losses.shape == truth.losses.shape
    absolute = relative * (1e-3 if relative < 1e-8 else truth.losses.abs().max().item())
    torch.testing.assert_close(result.losses, truth.losses, rtol=relative, atol=absolute, check_dtype=False)
    mean = {name: g.sum(0) / size for name, g in truth.gradients.items()}
    second_moment = {name: g.square().sum(0) / size for name, g in truth.gradients.items()}
    assert_same(result.mean, mean, problem, floor, left)
    assert_same(result.second_moment, second_moment, problem, floor * largest, {n: v**2 for n, v in left.items()})


def _assert_right_quantities(
    result: Quantities, truth: Truth, problem: Problem, rounding: float, left: Mapping[str, float]
) -> None:
    """Assert that the quantities of `asked` are what they should be."""
    size, largest = len(truth.losses), _largest(truth.gradients)
    squares = {n: v**2 for n, v in left.items()}
    second_moment = {name: g.square().sum(0) / size for name, g in truth.gradients.items()}
    assert_same(result.second_moment, second_moment, problem, rounding * largest, squares)
    assert_same(result.per_sample, truth.gradients, problem, rounding, left)
    weights = torch.linspace(-1, 2, size, dtype=truth.losses.dtype, device=truth.losses.device)
    weighted = {name: torch.tensordot(weights.to(g.dtype), g, 1) for name, g in truth.gradients.items()}
    assert_same(
        result.weighted_sum.gradient, weighted, problem, size * rounding, {n: size * v for n, v in left.items()}
    )
    relative = _relative(problem)
    for name, g in truth.gradients.items():
        rows = g.reshape(size, g[0].numel()).double()
        products = rows @ rows.mT
        entries = max(1, rows.shape[1]) * max(rounding, left[name])
        # A norm that comes as the root of a sum of products keeps half of the digits where these cancel.
        of_all = sum(float(other.double().square().sum()) for other in truth.gradients.values())
        allowed = 1e2 * relative * (of_all + entries**2) + rows.shape[1] * left[name] ** 2
        assert float((result.gram[name] - products).abs().max()) <= allowed, f"Gram matrix of {name}"
        assert float((result.norms[name].square() - products.diagonal()).abs().max()) <= allowed, f"norms of {name}"


def rounding(truth: Truth) -> float:
    """Return what is left of gradients that vanish in exact arithmetic: rounding, in the unit of the others."""
    return 1e-2 * _largest(truth.gradients) + 1e-5 * truth.losses.abs().max().item()


def assert_same(
    actual: Any, expected: Mapping[str, Tensor], problem: Problem, rounding: float, left: Mapping[str, float]
) -> None:
    """Assert the same keys, kinds of tensors and entries.

    Args:
        actual: what the backend returned.
        expected: what is right.
        problem: says how precise the computation is.
        rounding: what entries may differ by in that precision, beside their own rounding.
        left: what entries may differ by at all, by name.
    """
    parameters = dict(problem.model.named_parameters())
    relative = _relative(problem)
    assert list(actual) == list(expected), "keys, or their order"
    for name, value in expected.items():
        assert type(actual[name]) is Tensor, f"{name} is a {type(actual[name])}"
        assert not actual[name].requires_grad
        assert actual[name].layout is torch.strided
        assert actual[name].dtype == parameters[name].dtype
        assert actual[name].device == parameters[name].device
        absolute = relative * (rounding if relative < 1e-8 else max(10 * rounding, _largest({name: value})))
        torch.testing.assert_close(
            actual[name],
            value,
            rtol=relative,
            atol=absolute + left[name],
            msg=partial("{}: {}".format, name),
        )


def _relative(problem: Problem) -> float:
    """The difference that rounding explains: under autocast to bfloat16, products have 8 bits."""
    if problem.autocast is not None:
        return 5e-2
    dtypes = {p.dtype for p in problem.model.parameters()}
    return 1e-9 if dtypes <= {torch.float64} else 1e-4


def _largest(values: Mapping[str, Tensor]) -> float:
    return max((value.abs().max().item() for value in values.values() if value.numel()), default=0.0)
