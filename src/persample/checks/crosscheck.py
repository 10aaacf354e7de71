"""`crosscheck`: the error of each backend against a loop over the samples in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from persample.checks.copies import copy_of
from persample.errors import ContractError, PersampleError, UsageError
from persample.quantities import Quantity
from persample.quantities.computed import numbers_in, refuse_quantities
from persample.sources.batch import as_batch, in_float64
from persample.sources.model.random_state import RandomState, random_state, random_state_restored, same_random_state
from persample.sources.model.state import State, state_restored
from persample.sources.registry import make_source, name_with, names_side_by_side
from persample.sources.selfcheck.tolerances import MOVED
from persample.sources.selfcheck.verify import signed_root
from persample.sources.source import PerSampleGradSource

#: The largest relative error that rounding explains, by the dtype of the model's parameters.
ALLOWED = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 5e-2}


@dataclass(frozen=True)
class Agreement:
    """The error of one backend against the oracle: the largest relative error over all parameters.

    The error of a parameter is the largest difference of an entry over the largest entry of the oracle; parameters
    whose gradient vanishes next to the others' (below a thousandth) are measured against the latter.

    Attributes:
        backend: its name.
        mean: error of the mean gradient; None if the backend refused, infinite if what it returned has no error.
        second_moment: error of the second moment, compared as root mean squares.
        per_sample: error of the per-sample gradients.
        allowed: the largest error that rounding explains in the model's dtype.
        in_float64: where an error is above what rounding explains, the largest error of the same backend on a copy of
            the model in float64. Rounding may decide which pixel of a pooling window, or which side of a ReLU, gets
            the gradient; in float64 that is as good as excluded.
        problem: why the backend refused or cannot be imported, what it returned against its contract, or None.
        machinery: which of its machineries ran, for a backend that has several.
        quantities: error of the quantities that were asked for, each relative to its own largest entry; None if none
            were.
    """

    backend: str
    mean: float | None
    second_moment: float | None
    per_sample: float | None
    allowed: float
    in_float64: float | None = None
    problem: str | None = None
    machinery: str | None = None
    quantities: float | None = None

    @property
    def name(self) -> str:
        """The backend's name, with the machinery that ran: `"opacus (rules)"`."""
        return name_with(self.backend, self.machinery)

    @property
    def agrees(self) -> bool:
        """Whether the backend ran and all its errors are within what rounding explains."""
        if self.mean is None or self.second_moment is None or self.per_sample is None:
            return False
        largest = max(self.mean, self.second_moment, self.per_sample, self.quantities or 0.0)
        if self.in_float64 is not None:
            return self.in_float64 <= ALLOWED[torch.float64] and largest <= MOVED
        return largest <= self.allowed


def crosscheck(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Any],
    inputs: Any,
    targets: Any,
    *,
    backends: Iterable[str] | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    quantities: Sequence[Quantity[Any]] = (),
) -> list[Agreement]:
    """Compare backends with the loop over the samples, run in float64 on a copy of the model.

    Args:
        model: the network; it is not changed.
        loss_fn: the loss of each sample, or a loss module of `torch.nn`.
        inputs: a mini-batch, as for `PerSampleGradSource.moments`.
        targets: its targets.
        backends: names to compare. All that exist if None, those of several machineries with each of them, as
            `"opacus (module)"` and `"opacus (rules)"`.
        options: options for single backends, by name, such as `{"vmap": {"chunk_size": 16}}`.
        quantities: what `source.compute` is to be asked for, and compared, beside moments and per-sample gradients.

    Returns:
        One `Agreement` for each backend, in the order given. The self-check is off, so what is compared is what the
        backend itself returns.

    Raises:
        UnsupportedModelError: the model itself has no per-sample gradients, so the oracle refused it; or it cannot be
            copied.
        UsageError: a backend is asked for an approximation (`curvature="printed"`), which must not be compared as if
            it were exact.
    """
    options = options or {}
    names = names_side_by_side(options) if backends is None else list(backends)
    start = random_state(model)
    args, kwargs, targets = as_batch(inputs, targets, model).tree()
    refuse_quantities(quantities)
    problem = _Problem(model, loss_fn, kwargs or args, targets, start, quantities)
    with as_it_was(model), random_state_restored(model, start):
        make_source("loop", model, loss_fn).moments(problem.inputs, problem.targets)
        draws = not same_random_state(start, random_state(model))
    # A copy in float64 is the better oracle, but might draw other random numbers than the model itself.
    precise = problem if draws else problem.in_float64()
    expected = precise.results(precise.source("loop", {}, check="first"))
    allowed = ALLOWED[next((p.dtype for p in model.parameters()), torch.float32)]
    return [_agreement(name, options.get(name, {}), problem, precise, expected, allowed) for name in names]


def _agreement(
    name: str, options: Mapping[str, Any], problem: _Problem, precise: _Problem, expected: Any, allowed: float
) -> Agreement:
    """Compare one backend with the expected values, computed from `precise`, the problem in float64."""
    try:
        source = problem.source(name, options)
        found = problem.results(source)
        errors = _errors(found, expected)
        in_float64 = None
        if max(errors) > allowed and precise is not problem:
            in_float64 = max(_errors(precise.results(precise.source(name, options)), expected))
    except UsageError:
        raise
    except ContractError as error:
        return Agreement(name, math.inf, math.inf, math.inf, allowed, problem=str(error))
    except PersampleError as error:
        return Agreement(name, None, None, None, allowed, problem=str(error))
    except Exception as error:  # noqa: BLE001 - the loop ran, so it is the backend's, and the others go on
        return Agreement(name, None, None, None, allowed, problem=f"{type(error).__name__}: {error}")
    mean, root, rows, *of_quantities = errors
    nans, worst = _nans(found, expected), max(of_quantities, default=None)
    return Agreement(name, mean, root, rows, allowed, in_float64, nans, source.ran, worst)


@dataclass(frozen=True)
class _Problem:
    """The problem for all backends: the gradients of one batch, from the same state and random numbers."""

    model: nn.Module
    loss_fn: Callable[[Any, Any], Any]
    inputs: Any
    targets: Any
    start: RandomState
    quantities: Sequence[Quantity[Any]]

    def in_float64(self) -> _Problem:
        # A loss module may hold weights of its own.
        loss_fn = copy_of(self.loss_fn).double() if isinstance(self.loss_fn, nn.Module) else self.loss_fn
        model = copy_of(self.model).double()
        return _Problem(model, loss_fn, in_float64(self.inputs), in_float64(self.targets), self.start, self.quantities)

    def source(self, backend: str, options: Mapping[str, Any], check: str = "never") -> PerSampleGradSource:
        source = make_source(backend, self.model, self.loss_fn, check=check, **options)
        if not source.exact:
            raise UsageError(
                f"Backend {backend!r} was given an option for an approximate second moment, which crosscheck cannot "
                "compare with the exact one: omit that option."
            )
        return source

    def results(self, source: PerSampleGradSource) -> _Results:
        several: Sequence[Any] = ()
        if self.quantities:  # first, so that `ran` is told of the moments
            with as_it_was(self.model), random_state_restored(self.model, self.start):
                several = source.compute(self.inputs, self.targets, *self.quantities).results
        with as_it_was(self.model), random_state_restored(self.model, self.start):
            moments = source.moments(self.inputs, self.targets)
        with as_it_was(self.model), random_state_restored(self.model, self.start):
            gradients = source.per_sample(self.inputs, self.targets)
        # The second moment as root mean squares, in the unit of the gradients.
        root = {name: signed_root(s) for name, s in moments.second_moment.items()}
        return [moments.mean, root, gradients, *(numbers for result in several for numbers in _by_parameter(result))]


def as_it_was(model: nn.Module) -> AbstractContextManager[None]:
    """Restore the state of `model` afterwards (buffers, attributes, frozen parameters that it changes)."""
    return state_restored(State(model, [p for p in model.parameters() if not p.requires_grad]))


#: The mean gradient, the second moment, the per-sample gradients, and what there is of each quantity.
_Results = Sequence[Mapping[str, Tensor]]


def _errors(found: _Results, expected: _Results) -> list[float]:
    """The error of each result."""
    return [relative_error(values, of) for values, of in zip(found, expected, strict=True)]


def _by_parameter(result: Any) -> Iterable[Mapping[str, Tensor]]:
    """Return the numbers of a quantity: those by parameter together, each other tensor alone."""
    found: dict[str, dict[str, Tensor]] = {}
    for where, key, value in numbers_in(result):
        found.setdefault(where.removesuffix(f" of {key!r}"), {})[key] = value
    return found.values()


def _nans(found: _Results, expected: _Results) -> str | None:
    """Describe where the backend returned NaN and the oracle did not; None if nowhere."""
    names = ("mean gradient", "second moment", "per-sample gradient")
    for what, values, of in zip(names, found[:3], expected[:3], strict=True):
        for name, e in of.items():
            wrong = values[name].isnan() & ~e.isnan()
            if bool(wrong.any()):
                return f"the {what} of {name!r} is NaN in {int(wrong.sum())} of {e.numel()} entries, the loop's is not"
    return None


def relative_error(values: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Return the largest relative error over all parameters, infinite where keys, shapes or NaNs differ."""
    if values.keys() != expected.keys():
        return float("inf")
    largest = max((_largest(e) for e in expected.values()), default=0.0)
    errors = [0.0]
    for name, e in expected.items():
        if values[name].shape != e.shape:
            return float("inf")
        scale = max(_largest(e), 1e-3 * largest)
        if not torch.equal(values[name].isnan(), e.isnan()):
            return float("inf")
        difference = _largest(values[name].to(e.dtype) - e)
        if difference > 0:
            errors.append(difference / scale if scale > 0 else float("inf"))
    return max(errors)


def _largest(values: Tensor) -> float:
    return values.abs().nan_to_num(nan=0.0, posinf=math.inf).max().item() if values.numel() else 0.0
