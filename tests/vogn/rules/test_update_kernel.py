"""The kernel of lines 6 and 7 against the rule in PyTorch's own operations, with all settings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from persample.kernels import compiled, step
from persample.testing.devices import generator_of
from persample.vogn.param_group import Part
from persample.vogn.rules.vogn import vogn_update

pytestmark = pytest.mark.skipif(compiled.instruction_set() is None, reason="no kernels here")

SIZES = st.lists(st.sampled_from([0, 1, 7, 8, 15, 16, 17, 65, 4095, 4097]), min_size=1, max_size=4)
SETTINGS = st.fixed_dictionaries(
    {
        "lr": st.floats(1e-4, 1.0),
        "decay": st.sampled_from([0.0, 0.3, 0.5, 0.6, 0.999, 1.0]),
        "momentum": st.sampled_from([0.0, 0.4, 0.5, 0.9]),
        "bias_correction": st.booleans(),
        "average_prior": st.booleans(),
        "damping": st.sampled_from([0.0, 0.01]),
        "max_update": st.sampled_from([None, 0.1, float("inf")]),
        "order": st.sampled_from(["printed", "updated"]),
    }
)


def part(sizes: list[int], settings: dict[str, Any], dtype: torch.dtype, seed: int, **changed: Any) -> Part:
    generator = generator_of(seed)
    mean = [torch.randn(n, generator=generator, dtype=dtype) for n in sizes]
    states: list[dict[str, Any]] = [{"curvature": torch.rand(n, generator=generator, dtype=dtype)} for n in sizes]
    if seed % 2:
        for state, m in zip(states, mean, strict=True):
            state |= {"momentum_buffer": 0.1 * m.flip(0), "momentum_mass": 0.19}
    shared = {"data_size": 100.0, "prior_precision": 20.0, "prior_mean": (seed % 3) * 0.5, "temperature": 0.3}
    return Part(settings, [str(i) for i in range(len(sizes))], mean, states, **shared | changed)


def observed(part: Part) -> tuple[list[Tensor], list[Tensor]]:
    gradient = [m.roll(1) + 0.3 for m in part.mean]
    return gradient, [g.square() * 1.5 for g in gradient]


def tensors(updated: tuple[Any, list[dict[str, Any]]]) -> list[Tensor]:
    mean, states = updated
    return [*mean, *(value for state in states for value in state.values() if isinstance(value, Tensor))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(sizes=SIZES, settings=SETTINGS, seed=st.integers(0, 1000))
def test_the_kernel_gives_what_the_rule_gives(
    dtype: torch.dtype, sizes: list[int], settings: dict[str, Any], seed: int
) -> None:
    of = part(sizes, settings, dtype, seed)
    by_kernel = vogn_update(of, *observed(of))
    with compiled.without_kernels():
        expected = vogn_update(of, *observed(of))
    for state, other in zip(by_kernel[1], expected[1], strict=True):
        assert state.keys() == other.keys()
        assert state.get("momentum_mass") == other.get("momentum_mass")
    tolerance = 2e-6 if dtype == torch.float32 else 1e-14
    for got, wanted in zip(tensors(by_kernel), tensors(expected), strict=True):
        torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


def test_it_is_the_kernel_that_is_tested() -> None:
    of = part([3], {}, torch.float32, 0)
    numbers = dict.fromkeys(("decay", "beta", "averaged_prior", "prior", "prior_mean", "shift", "lr"), 0.5)
    found = step.update(
        of.mean, of.state("curvature"), None, *observed(of), mass=1.0, max_update=None, order_updated=False, **numbers
    )
    assert found is not None


def test_nothing_that_is_passed_in_changes_and_threads_do_not_matter() -> None:
    settings = {"lr": 0.1, "decay": 0.9, "momentum": 0.9, "bias_correction": True, "average_prior": False}
    settings |= {"damping": 0.0, "max_update": None, "order": "printed"}
    of = part([5000, 12289], settings, torch.float32, 1)
    gradient, second_moment = observed(of)
    given_tensors = [*of.mean, *gradient, *second_moment, *of.state("curvature"), *of.state("momentum_buffer")]
    copies = [t.clone() for t in given_tensors]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(tensors(vogn_update(of, gradient, second_moment)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(given_tensors, copies, strict=True))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("max_update", [None, 0.5])
def test_what_is_not_finite_stays_so(max_update: float | None) -> None:
    settings = {"lr": 0.1, "decay": 0.9, "momentum": 0.9, "bias_correction": True, "average_prior": False}
    settings |= {"damping": 0.0, "max_update": max_update, "order": "printed"}
    of = part([20], settings, torch.float32, 1)
    gradient, second_moment = observed(of)
    gradient[0][3], gradient[0][17], second_moment[0][4] = torch.nan, torch.inf, torch.inf
    by_kernel = tensors(vogn_update(of, gradient, second_moment))
    with compiled.without_kernels():
        expected = tensors(vogn_update(of, gradient, second_moment))
    for got, wanted in zip(by_kernel, expected, strict=True):
        torch.testing.assert_close(got, wanted, equal_nan=True)
    assert by_kernel[0][3].isnan()


@pytest.mark.parametrize("change", [{"prior_precision": [torch.full((4,), 2.0)]}, {"prior_mean": [torch.ones(4)]}])
def test_priors_of_single_weights_are_left_to_the_rule(change: dict[str, Any]) -> None:
    settings = {"lr": 0.1, "decay": 0.9, "momentum": 0.0, "bias_correction": True, "average_prior": False}
    settings |= {"damping": 0.0, "max_update": None, "order": "printed"}
    numbers = {name: value[0][0].item() for name, value in change.items()}
    each, one = (part([4], settings, torch.float32, 0, **values) for values in (change, numbers))
    for got, wanted in zip(
        tensors(vogn_update(each, *observed(each))), tensors(vogn_update(one, *observed(one))), strict=True
    ):
        torch.testing.assert_close(got, wanted)
