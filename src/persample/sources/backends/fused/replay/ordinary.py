"""The ordinary way: what is known of the source whose steps are replayed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from persample.sources.backends.fused.replay.request import Request
from persample.sources.batch import Batch
from persample.sources.model.state import State


class Ordinary(Protocol):
    """What is known of the source whose steps are replayed."""

    model: nn.Module
    loss_fn: Callable[[Any, Any], Any]
    deterministic: bool
    ordinary_state: bool

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters that require a gradient, by name."""

    def state(self) -> State:
        """Return what the model keeps from one forward pass to the next, as it is now."""

    def recorded_with(
        self,
        losses: Callable[[], Tensor],
        parameters: dict[str, Any],
        batch: Batch,
        what: Request,
        own: Sequence[Tensor],
    ) -> tuple[Any, bool]:
        """Return what is wanted of a batch, with other parameters and what else runs model and loss.

        Also whether the state that is left on the model is that of an ordinary forward pass.
        """
