"""What waits for the next step: observations, and changes of `p.grad` since."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol

from torch import Tensor

from persample.moments import Moments
from persample.sources.recording.results import LossReduction, Recorded
from persample.vogn.changed_gradients import Left, warn_of_unused, with_changes, without_dropped
from persample.vogn.observations import Observations, Observed


class MomentSource(Protocol):
    """Computes the moments of a batch's gradients at the current weights."""

    def moments(self, inputs: Any, targets: Any) -> Moments:
        """Return the moments, as `persample.PerSampleGradSource.moments` does."""

    def recording(self, loss_reduction: LossReduction = "mean") -> Any:
        """Record the user's passes, as `persample.PerSampleGradSource.recording` does."""


class Pending:
    """The observations since the last step, and what the user's passes left in `p.grad`.

    A copy has no `p.grad`, as copies of parameters have none.

    Args:
        draws_apart: whether each draw is kept apart.
    """

    def __init__(self, *, draws_apart: bool) -> None:
        self.observations = Observations()
        self.left: Left | None = None
        self.used: Mapping[str, Tensor] = {}  # what was in `p.grad` at the last step
        self._draws_apart = draws_apart
        self._warned = False

    def forget(self) -> None:
        """Discard the observations."""
        self.observations, self.left = Observations(), None

    def with_more(self, observations: Observations, observed: Observed, place: int | None) -> Observations:
        """Return `observations` with more in the part at `place`; if that is None, as another draw."""
        if not self._draws_apart:
            place = 0 if observations.parts else None
        return observations.with_more(observed, place)

    def add_recorded(
        self,
        recorded: Recorded,
        observed: Observed,
        params: Mapping[str, Tensor],
        *,
        scale: float,
        scaler: bool,
        place: int | None = None,
    ) -> None:
        """Add the recording of the user's passes.

        Args:
            recorded: the recording.
            observed: the moments of the trained parameters.
            params: these parameters, by name.
            scale: by which the losses were multiplied,
            scaler: and whether a gradient scaler did so.
            place: the part whose draw it was; None if it was another draw.

        Raises:
            UsageError: the user changed `p.grad`, and what it means cannot be told.
        """
        # The first block's gradients are looked at by the second, or by the step, which also knows whether a gradient
        # scaler has divided by its scale.
        if scale == 1 and self.observations.parts:
            alone = Left.by(recorded, scale, None)
            changed, left = with_changes(Observations([observed]), alone, params, unscaled=False, final=True)
            observed, recorded.left = changed.parts[0], left.gradients
        observations = self.with_more(self.observations, observed, place)
        if not scaler:
            observations = replace(observations, without_scaler=True)
        self.left = Left.by(recorded, scale, self.left if self.observations.parts else None)
        self.observations = observations

    def take_changes(
        self, params: Mapping[str, Tensor], *, at_the_step: bool, unscaled: bool, several_processes: bool
    ) -> None:
        """Take over changes of `p.grad` since the last block.

        Args:
            params: the trained parameters that require a gradient, by name.
            at_the_step: whether the step follows; else another block.
            unscaled: whether a gradient scaler has divided by its scale.
            several_processes: whether others train, too.

        Raises:
            UsageError: what it means cannot be told.
        """
        if at_the_step and not self.observations.parts:
            return
        if self.left is None or not self.observations.parts:
            self._warned = self._warned or warn_of_unused(params, self.used)
            return
        self.observations, self.left = with_changes(
            self.observations, self.left, params, unscaled=unscaled, final=at_the_step
        )
        if at_the_step:
            self.observations = without_dropped(
                self.observations, self.left, params, several_processes=several_processes
            )
            self.used = self.left.gradients

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"left": None, "used": {}}
