"""Choosing among forms: one that raises is none, whenever it does so; wrong operands raise what PyTorch says."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from persample.kernels import autotune
from persample.kernels.autotune import COMPILED, Key, choose, deterministic_choice
from persample.kernels.compiled import without_kernels

Form = Callable[[Tensor], tuple[Tensor]]


def doubled(x: Tensor) -> tuple[Tensor]:
    return (x + x,)


def of_contiguous_ones(x: Tensor) -> tuple[Tensor]:
    """A form that takes some strides only."""
    return (x.view(-1).mul(2).view(x.shape),)


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_form_that_raises_is_none(deterministic: bool) -> None:
    x = torch.randn(3, 4)
    forms: dict[str, Form] = {"a": of_contiguous_ones, "b": doubled}
    with deterministic_choice(deterministic):
        for name, operand in (("first", x.T), ("first", x.T), ("later", x.view(4, 3)), ("later", x.T)):
            (result,) = choose(Key(name, (int(deterministic),)), lambda: forms, operand)
            assert torch.equal(result, 2 * operand)


@pytest.mark.parametrize("deterministic", [False, True])
def test_if_none_runs_the_first_error_is_raised(deterministic: bool) -> None:
    forms: dict[str, Form] = {"a": lambda x: (x @ x,), "b": lambda x: (x.view(5),)}
    with deterministic_choice(deterministic), pytest.raises(RuntimeError, match="cannot be multiplied"):
        choose(Key("none", (int(deterministic),)), lambda: forms, torch.randn(3, 4))


def test_results_without_entries_agree() -> None:
    (result,) = choose(Key("empty", (0,)), lambda: {"a": doubled, "b": of_contiguous_ones}, torch.zeros(0, 3))
    assert result.shape == (0, 3)


def test_what_was_chosen_with_kernels_does_not_serve_without() -> None:
    """On a GPU the forms are others then."""
    x = torch.ones(2)
    for _ in range(2):
        assert choose(Key("kernels", (2,)), lambda: {"triton": lambda x: (3 * x,)}, x)[0].tolist() == [3.0, 3.0]
        with without_kernels():
            assert choose(Key("kernels", (2,)), lambda: {"a": doubled}, x)[0].tolist() == [2.0, 2.0]


def test_lengths_alike_share_a_trial() -> None:
    calls = {"a": 0, "b": 0}

    def counted(name: str) -> Form:
        def form(x: Tensor) -> tuple[Tensor]:
            calls[name] += 1
            return doubled(x)

        return form

    def run(length: int) -> int:
        before = sum(calls.values())
        (result,) = choose(Key("alike", (2, length)), lambda: {n: counted(n) for n in calls}, torch.ones(2, length))
        assert torch.equal(result, torch.full((2, length), 2.0))
        return sum(calls.values()) - before

    assert run(64) > 1  # timed
    assert [run(length) for length in range(65, 128)] == [1] * 63
    assert run(128) > 1


@pytest.mark.parametrize(("unit", "runs"), [(1.0, [1, 3, 3, 1]), (1e-6, [2, 5, 5, 2])])
def test_of_slow_forms_the_two_best_are_timed(unit: float, runs: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that each form moves on."""
    now, counts = [0.0], [0, 0, 0, 0]
    monkeypatch.setattr(autotune.time, "perf_counter", lambda: now[0])

    def taking(index: int, seconds: float) -> Form:
        def form(x: Tensor) -> tuple[Tensor]:
            now[0] += unit * seconds
            counts[index] += 1
            return doubled(x)

        return form

    forms = {str(index): taking(index, seconds) for index, seconds in enumerate((5, 2, 1, 4))}
    choose(Key(("slow", unit), (1,)), lambda: forms, torch.ones(3))
    assert counts == runs
    choose(Key(("slow", unit), (1,)), lambda: forms, torch.ones(3))
    assert counts[2] == runs[2] + 1


def test_the_same_sort_of_form_serves_other_numbers_of_samples_at_a_time() -> None:
    for number in (4, 5):
        (result,) = choose(Key("pieces", (number,)), lambda n=number: {f"pieces {n}": doubled}, torch.ones(3))
        assert torch.equal(result, torch.full((3,), 2.0))


@pytest.mark.parametrize("deterministic", [False, True])
def test_few_shapes_are_compiled(deterministic: bool) -> None:
    compiled = set()

    def kept(x: Tensor) -> tuple[Tensor]:
        compiled.add(x.shape)
        return doubled(x)

    forms = {COMPILED: kept, "other": doubled}
    with deterministic_choice(deterministic):
        for length in range(1, 200):
            choose(Key(("compiled", deterministic), (2, length)), lambda: forms, torch.ones(2, length))
    assert 0 < len(compiled) <= 16


def test_what_came_before_does_not_decide_deterministic_choices() -> None:
    forms: dict[str, Form] = {COMPILED: lambda x: (x + 1,), "other": lambda x: (x + 2,)}

    def results(kind: str, lengths: list[int]) -> dict[int, float]:
        with deterministic_choice(True):
            return {n: choose(Key(kind, (2, n)), lambda: forms, torch.zeros(1))[0].item() for n in lengths}

    assert results("up", list(range(100))) == results("down", list(reversed(range(100))))


def test_keys_are_not_kept_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autotune, "_MOST_KEYS", 16)
    monkeypatch.setattr(autotune, "_chosen", {})
    for length in range(100):
        choose(Key("kept", (length,)), lambda: {"a": doubled}, torch.ones(1))
    assert len(autotune._chosen) <= 16
