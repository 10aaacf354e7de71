"""`crosscheck`: how far each backend is from a loop over the samples in float64."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from persample.errors import PersampleError, UsageError
from persample.moments import Moments
from persample.sources.registry import backends as all_backends
from persample.sources.registry import make_source
from persample.sources.untouched import random_state, random_state_restored, same_random_state

#: The largest relative error that rounding explains, by the dtype of the model's parameters.
ALLOWED = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 5e-2}


@dataclass(frozen=True)
class Agreement:
    """How far one backend is from the oracle, as the largest relative error over all parameters.

    The error of a parameter is the largest difference of an entry over the largest entry of the oracle; parameters
    whose gradient vanishes next to the others' (below a thousandth) are measured against the latter.

    Attributes:
        backend: its name.
        mean: error of the mean gradient; None if the backend refused.
        second_moment: error of the second moment, compared as root mean squares.
        per_sample: error of the per-sample gradients.
        allowed: the largest error that rounding explains in the model's dtype.
        problem: why the backend refused or cannot be imported, or None.
    """

    backend: str
    mean: float | None
    second_moment: float | None
    per_sample: float | None
    allowed: float
    problem: str | None = None

    @property
    def agrees(self) -> bool:
        """Whether the backend ran and all its errors are within what rounding explains."""
        errors = (self.mean, self.second_moment, self.per_sample)
        return self.problem is None and all(error is not None and error <= self.allowed for error in errors)


def crosscheck(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Any],
    inputs: Any,
    targets: Any,
    *,
    backends: Iterable[str] | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[Agreement]:
    """Compare backends with the loop over the samples, run in float64 on a copy of the model.

    Args:
        model: the network; it is not changed.
        loss_fn: the loss of each sample, or a loss module of `torch.nn`.
        inputs: a mini-batch, as for `PerSampleGradSource.moments`.
        targets: its targets.
        backends: names to compare; all that exist if None.
        options: options for single backends, by name, such as `{"vmap": {"chunk_size": 16}}`.

    Returns:
        One `Agreement` for each backend, in the order given. The self-check is off, so what is compared is what the
        backend itself returns.

    Raises:
        UnsupportedModelError: the model itself has no per-sample gradients, so the oracle refused it.
        UsageError: a backend is asked for an approximation (`curvature="printed"`), which must not be compared as if
            it were exact.
    """
    names = list(all_backends()) if backends is None else list(backends)
    options = options or {}
    start = random_state(model)
    with random_state_restored(model, start):
        oracle = make_source("loop", model, loss_fn)
        oracle.moments(inputs, targets)
        draws = not same_random_state(start, random_state(model))
    if not draws:
        # A copy in float64 is the better oracle, but might draw other random numbers than the model itself.
        oracle = make_source("loop", copy.deepcopy(model).double(), _in_float64(loss_fn))
        oracle_inputs, oracle_targets = _double(inputs), _double(targets)
    else:
        oracle_inputs, oracle_targets = inputs, targets
    with random_state_restored(model, start):
        moments = oracle.moments(oracle_inputs, oracle_targets)
    with random_state_restored(model, start):
        gradients = oracle.per_sample(oracle_inputs, oracle_targets)
    allowed = ALLOWED[next((p.dtype for p in model.parameters()), torch.float32)]

    results = []
    for name in names:
        try:
            source = make_source(name, model, loss_fn, check="never", **options.get(name, {}))
            if not source.exact:
                raise UsageError(
                    f"Backend {name!r} is asked for an approximation of the second moment, which crosscheck does not "
                    "compare as if it were exact: leave that option away."
                )
            with random_state_restored(model, start):
                found_moments = source.moments(inputs, targets)
            with random_state_restored(model, start):
                found_gradients = source.per_sample(inputs, targets)
        except UsageError:
            raise
        except PersampleError as error:
            results.append(Agreement(name, None, None, None, allowed, problem=str(error)))
            continue
        results.append(
            Agreement(
                name,
                mean=relative_error(found_moments.mean, moments.mean),
                second_moment=relative_error(_root(found_moments), _root(moments)),
                per_sample=relative_error(found_gradients, gradients),
                allowed=allowed,
            )
        )
    return results


def relative_error(values: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Return the largest relative error over all parameters, infinite where keys or shapes differ."""
    if values.keys() != expected.keys():
        return float("inf")
    largest = max((_largest(e) for e in expected.values()), default=0.0)
    errors = [0.0]
    for name, e in expected.items():
        if values[name].shape != e.shape:
            return float("inf")
        scale = max(_largest(e), 1e-3 * largest)
        difference = _largest(values[name].to(e.dtype) - e)
        if difference != 0:  # also where it is not a number
            errors.append(difference / scale if scale > 0 else float("inf"))
    return max(errors) if not any(math.isnan(error) for error in errors) else float("inf")


def _root(moments: Moments) -> dict[str, Tensor]:
    return {name: s.sqrt() for name, s in moments.second_moment.items()}


def _largest(values: Tensor) -> float:
    return values.abs().max().item() if values.numel() else 0.0


def _double(tree: Any) -> Any:
    def double(leaf: Any) -> Any:
        return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    return pytree.tree_map(double, tree)


def _in_float64(loss_fn: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """A loss module may hold weights of its own."""
    return copy.deepcopy(loss_fn).double() if isinstance(loss_fn, nn.Module) else loss_fn
