"""One model with one mini-batch and one loss: what a backend is asked in a test."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from persample.sources.selfcheck.perturbation import rounding_left
from persample.testing.devices import generator_state, set_seed
from persample.testing.truth import Stream, Truth, call, per_sample_truth, unwrapped


@dataclass(frozen=True)
class Problem:
    """A model, a mini-batch and a loss.

    Attributes:
        model: the network.
        inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments of the model.
        targets: what the loss takes.
        loss_fn: what the backend is given.
        true_loss_fn: the same loss as plain tensor operations, where `loss_fn` is a loss module of `torch.nn`.
        seed: of the random numbers of the call.
        autocast: the dtype of `torch.autocast` around the call, or None.
        impossible: whether the gradients of single samples do not exist, so that every backend must refuse.
    """

    model: nn.Module
    inputs: Any
    targets: Any
    loss_fn: Callable[[Any, Any], Any]
    true_loss_fn: Callable[[Any, Any], Tensor] | None = None
    seed: int = 0
    autocast: torch.dtype | None = None
    impossible: bool = False

    def autocasting(self) -> AbstractContextManager[Any]:
        """Return the context in which everything about this problem is computed."""
        return (
            contextlib.nullcontext()
            if self.autocast is None
            else torch.autocast(torch.get_default_device().type, self.autocast)
        )

    def truth(self, stream: Stream = "batch") -> Truth:
        """Return the gradients of the single samples, with random numbers from `stream`, where any are drawn."""
        stream = stream if self.draws_random_numbers() else "each"
        loss_fn = self.true_loss_fn or self.loss_fn
        with self.autocasting():
            return per_sample_truth(self.model, loss_fn, self.inputs, self.targets, stream=stream, seed=self.seed)

    def rounding_left(self, stream: Stream = "batch") -> dict[str, float]:
        """Return what rounding leaves of gradients that vanish in exact arithmetic, by name; zero for all others."""

        def gradients(model: nn.Module, inputs: Any) -> dict[str, Tensor]:
            return dataclasses.replace(self, model=model, inputs=inputs).truth(stream).gradients

        dtypes = {p.dtype for p in self.model.parameters()} | ({self.autocast} if self.autocast else set())
        return rounding_left(self.model, self.inputs, gradients, max(dtypes, key=_eps, default=torch.float64))

    def draws_random_numbers(self) -> bool:
        """Return whether the forward pass does."""
        set_seed(self.seed)
        before = generator_state()
        return not torch.equal(self.after_one_forward_pass[0], before)

    @cached_property
    def after_one_forward_pass(self) -> tuple[Tensor, list[Tensor]]:
        """The state of the random numbers and the buffers after one ordinary forward pass over the batch."""
        replica = copy.deepcopy(self.model)
        set_seed(self.seed)
        with torch.no_grad(), self.autocasting():
            call(replica, unwrapped(self.inputs))
        return generator_state(), list(replica.buffers())


def _eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps
