"""Choosing among forms: one that raises is none, whenever it does so; wrong operands raise what PyTorch says."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from persample.sources.fused.choice import choose, deterministic_choice

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
            (result,) = choose((name, deterministic), lambda: forms, operand)
            assert torch.equal(result, 2 * operand)


@pytest.mark.parametrize("deterministic", [False, True])
def test_if_none_runs_the_first_error_is_raised(deterministic: bool) -> None:
    forms: dict[str, Form] = {"a": lambda x: (x @ x,), "b": lambda x: (x.view(5),)}
    with deterministic_choice(deterministic), pytest.raises(RuntimeError, match="cannot be multiplied"):
        choose(("none", deterministic), lambda: forms, torch.randn(3, 4))


def test_results_without_entries_agree() -> None:
    (result,) = choose("empty", lambda: {"a": doubled, "b": of_contiguous_ones}, torch.zeros(0, 3))
    assert result.shape == (0, 3)
