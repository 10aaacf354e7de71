"""Merging moments of micro-batches."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from persample import Moments, merge_moments
from persample.errors import OptionError, UsageError
from persample.testing.devices import generator_of


def moments_of(rows: torch.Tensor) -> Moments:
    """Moments of gradients that are given as rows, with losses that tell the samples apart."""
    return Moments(losses=rows.sum(1), mean={"w": rows.mean(0)}, second_moment={"w": rows.square().mean(0)})


@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=5), seed=st.integers(0, 1000))
def test_merged_micro_batches_are_the_whole_batch(sizes: list[int], seed: int) -> None:
    rows = torch.randn(sum(sizes), 3, generator=generator_of(seed), dtype=torch.float64)
    merged = merge_moments(moments_of(part) for part in rows.split(sizes))
    whole = moments_of(rows)
    torch.testing.assert_close(merged.losses, whole.losses)
    torch.testing.assert_close(merged.mean, whole.mean)
    torch.testing.assert_close(merged.second_moment, whole.second_moment)
    assert merged.batch_size == sum(sizes)


def test_merging_changes_no_part() -> None:
    first, second = moments_of(torch.ones(2, 3)), moments_of(torch.zeros(1, 3))
    merge_moments([first, second])
    assert torch.equal(first.mean["w"], torch.ones(3))
    assert torch.equal(second.mean["w"], torch.zeros(3))


def test_merging_one_part_gives_a_copy_of_it() -> None:
    part = moments_of(torch.ones(2, 3))
    merged = merge_moments([part])
    merged.mean["w"].zero_()
    assert torch.equal(part.mean["w"], torch.ones(3))


def test_merging_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="no moments"):
        merge_moments([])


def test_merging_different_models_is_refused() -> None:
    other = Moments(torch.zeros(1), {"v": torch.zeros(3)}, {"v": torch.zeros(3)})
    with pytest.raises(UsageError, match="v, w"):
        merge_moments([moments_of(torch.ones(2, 3)), other])


def test_moments_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        moments_of(torch.ones(2, 3)).losses = torch.zeros(2)  # type: ignore[misc]


def test_variance_and_noise_scale() -> None:
    generator = generator_of(0)
    g = 0.5 + torch.randn(6, 4, dtype=torch.float64, generator=generator)
    moments = Moments(torch.zeros(6), {"a": g.mean(0)}, {"a": g.square().mean(0)})
    torch.testing.assert_close(moments.variance()["a"], g.var(0))
    trace = float(g.var(0).sum())
    squared = float(g.mean(0).square().sum()) - trace / 6
    assert moments.noise_scale() == pytest.approx(trace / squared if squared > 0 else float("inf"))
    assert moments.noise_scale(per={"all": ["a"]}) == {"all": moments.noise_scale()}
    assert moments.noise_scale(per="parameter") == {"a": moments.noise_scale()}
    with pytest.raises(OptionError, match="names 'b', which is no parameter"):
        moments.noise_scale(per={"all": ["b"]})
    one = Moments(torch.zeros(1), {"a": g[0]}, {"a": g[0].square()})
    with pytest.raises(UsageError, match="one gradient"):
        one.variance()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_noise_scale_of_many_numbers(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    shapes = {"a": (3, 700), "b": (512,), "c": (5,), "d": (), "e": (64, 4, 3, 3), "f": (0, 2)}
    g = {name: 1 + torch.randn(6, *shape, dtype=torch.float64) for name, shape in shapes.items()}
    mean = {name: rows.mean(0).to(dtype) for name, rows in g.items()}
    mean["a"] = mean["a"].T.contiguous().T
    second = {name: rows.square().mean(0).to(dtype) for name, rows in g.items()}
    moments = Moments(torch.zeros(6), mean, second)

    def expected(names: Iterable[str]) -> float:
        squares = sum(float(second[name].double().sum()) for name in names)
        total = sum(float(mean[name].double().square().sum()) for name in names)
        trace = (squares - total) * 6 / 5
        return trace / (total - trace / 6)

    close = {"rel": 1e-12 if dtype == torch.float64 else 1e-6}
    assert moments.noise_scale() == pytest.approx(expected(shapes), **close)
    groups = {name: [name] for name in "abcde"} | {"two": ["a", "c"]}
    by_group = moments.noise_scale(per=groups | {"none": []})
    positive = {group: names for group, names in groups.items() if expected(names) > 0}
    assert len(positive) > 2
    for group, names in positive.items():
        assert by_group[group] == pytest.approx(expected(names), **close)
    assert by_group["none"] == float("inf")


def test_noise_scale_of_modules() -> None:
    g = 1 + torch.randn(6, 4, dtype=torch.float64, generator=generator_of(0))
    rows = {"0.weight": g, "0.bias": g[:, :2], "01.weight": 2 * g[:, 1:], "2": 1 + g}
    moments = Moments(
        torch.zeros(6), {n: r.mean(0) for n, r in rows.items()}, {n: r.square().mean(0) for n, r in rows.items()}
    )
    by_module = moments.noise_scale(per={"first": ["0", "0.bias"], "one": "01"})
    by_name = moments.noise_scale(per={"first": ["0.weight", "0.bias"], "one": ["01.weight"]})
    assert by_module == by_name


def test_noise_scale_is_unbiased_in_both_of_its_parts() -> None:
    """Averaged over many batches of two, numerator and denominator are those of the distribution."""
    generator = generator_of(0)
    expectation = torch.tensor([1.0, 2.0], dtype=torch.float64)
    traces, squares = [], []
    for _ in range(4000):
        g = expectation + torch.randn(2, 2, dtype=torch.float64, generator=generator)
        moments = Moments(torch.zeros(2), {"a": g.mean(0)}, {"a": g.square().mean(0)})
        trace = float(moments.variance()["a"].sum())
        traces.append(trace)
        squares.append(float(g.mean(0).square().sum()) - trace / 2)
        if squares[-1] > 0:
            assert moments.noise_scale() == pytest.approx(trace / squares[-1])
    assert sum(traces) / 4000 == pytest.approx(2, rel=0.05)
    assert sum(squares) / 4000 == pytest.approx(5, rel=0.05)
