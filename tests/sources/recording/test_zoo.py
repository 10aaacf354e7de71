"""The whole zoo in forward and backward passes of the user: the numbers of `per_sample_truth`, or a refusal."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch

import persample
from persample.errors import UnsupportedModelError
from persample.testing.devices import set_seed
from persample.testing.truth import call, per_sample_truth
from persample.testing.zoo import ZOO, Case

WITHOUT_GRADIENT = ("All frozen", "No parameters", "No layer that is used", "Detached model", "Linear without outputs")
#: Their outputs are rounding alone, and so is every loss that is made of them: the self-check may refuse that.
ROUNDING_ALONE = ("Vanishing loss behind a norm of one number", "Vanishing loss of a norm of one number")
CASES = [case for case in ZOO.values() if case.name not in WITHOUT_GRADIENT + ROUNDING_ALONE]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("backend", ["fused", "loop"])  # one that watches the pass, and one that repeats it
def test_recorded_moments(backend: str, case: Case) -> None:
    problem = case.problem(3)
    model = problem.model
    autocast: Any = (
        torch.autocast(torch.get_default_device().type, problem.autocast) if problem.autocast else nullcontext()
    )
    with autocast:
        truth = per_sample_truth(model, problem.loss_fn, problem.inputs, problem.targets, stream="batch")
    source = persample.make_source(backend, model, problem.loss_fn)
    set_seed(0)
    try:
        with source.recording("sum") as recorded:
            with autocast:
                losses = problem.loss_fn(call(model, problem.inputs), problem.targets)
            losses.sum().backward()
    except UnsupportedModelError:
        assert case.impossible
        return
    assert not case.impossible
    found = recorded.moments()
    exact = case.dtype == torch.float64 and not case.autocast
    allowed = 1e-7 if exact else 3e-2
    largest = max((g.abs().max().item() for g in truth.gradients.values() if g.numel()), default=0.0)
    largest = max(largest, 1e-4 * truth.losses.abs().max().item())  # gradients that vanish are rounding alone
    for name, rows in truth.gradients.items():
        rows = rows.double()
        torch.testing.assert_close(found.mean[name].double(), rows.mean(0), rtol=0, atol=allowed * largest)
        due = rows.square().mean(0).sqrt()
        torch.testing.assert_close(found.second_moment[name].double().sqrt(), due, rtol=0, atol=allowed * largest)
