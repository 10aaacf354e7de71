"""Changes of `p.grad` between `backward()` and `step()`: clipping, masks, noise, penalties.

With c_i what the loss of sample i weighs in the loss of its backward pass, all passes together leave Σ_i c_i g_i in
`p.grad`. So if the user makes G of it, the step takes G / Σ_i c_i for ĝ. The mean squares of the gradients, which are
not in `p.grad`, stay as they are. Where the c_i differ, as in means over batches of other sizes, Σ_i c_i g_i is not the
sum over the samples that was observed, so a change is refused, unless the user said by what the means were multiplied
(`loss_scale`), and so how they are to be averaged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from persample.dtypes import at_least_float32
from persample.errors import UsageError
from persample.moments import Moments
from persample.sources.recording.p_grad import copied, gradients_in, is_changed
from persample.sources.recording.results import Recorded
from persample.vogn.observations import Observations, Observed
from persample.warn import warn

# How far the recorded sums may be from what is in p.grad, in units of rounding of its largest entry: both were added up
# in other orders, and over whatever the batch and its positions are.
_ROUNDINGS = 4096


class UnusedGradientWarning(UserWarning):
    """`p.grad` holds a gradient that the step will not use."""


@dataclass(frozen=True)
class Left:
    """The gradients that recorded passes left in `p.grad`.

    Attributes:
        gradients: by name, as far as there was one.
        weight: Σ_i c_i, without the scale; None if it is ambiguous.
        scale: of the gradient scaler, 1 without one.
        weights: the different c_i.
        due: Σ_i c_i g_i by name, as it was recorded, where that is not to be told from the mean over the samples.
    """

    gradients: Mapping[str, Tensor]
    weight: float | None
    scale: float
    weights: frozenset[float] = frozenset()
    due: Mapping[str, Tensor] | None = None

    @staticmethod
    def by(recorded: Recorded, scale: float, earlier: Left | None) -> Left:
        """Return what the passes in `recorded` left, added to `earlier`."""
        weights = {recorded.weight(sums) for sums in recorded.sums}
        total = sum(recorded.weight(sums) * sums.size for sums in recorded.sums)
        due = None if recorded.loss_scale is None else _added([sums.total for sums in recorded.sums])
        known = True
        if earlier is not None:
            weights |= earlier.weights
            total += earlier.weight or 0.0
            due = None if due is None or earlier.due is None else _added([earlier.due, due])
            known = earlier.weight is not None and earlier.scale == scale
        known = known and (len(weights) == 1 or due is not None)
        return Left(recorded.left, total if known and total else None, scale, frozenset(weights), due)

    def unscaled(self) -> Left:
        """Return the same after a gradient scaler has divided by its scale."""
        gradients = {name: g * (1 / self.scale) for name, g in self.gradients.items()}
        due = None if self.due is None else {name: g * (1 / self.scale) for name, g in self.due.items()}
        return replace(self, gradients=gradients, scale=1.0, due=due)


def with_changes(
    observations: Observations, left: Left, parameters: Mapping[str, Tensor], *, unscaled: bool, final: bool
) -> tuple[Observations, Left]:
    """Return the observations with the current gradients in `p.grad`, and these gradients.

    Args:
        observations: what the passes gave.
        left: what they left in `p.grad`.
        parameters: those that are trained, by name.
        unscaled: whether a gradient scaler has divided by its scale.
        final: whether `p.grad` must be there still.

    Raises:
        UsageError: something was changed, and what it means for the step cannot be told; or all is gone.
    """
    present = gradients_in(parameters)
    if unscaled or (left.scale != 1 and not is_changed(present, left.unscaled().gradients)):
        left = left.unscaled()
    changed = is_changed(present, left.gradients)
    if final and (changed or len(present) < len(left.gradients)):
        _refuse_emptied(present, left)
    if not changed:
        return observations, left
    if left.scale != 1:
        raise UsageError(
            "p.grad was changed while it was still multiplied by the gradient scaler's scale: call "
            "scaler.unscale_(optimizer) first, then change p.grad, then scaler.step(optimizer)."
        )
    if len(observations.parts) != 1 or not _is_made_of(left, observations.parts[0].moments):
        raise UsageError(
            "p.grad was changed after the backward pass, but it holds more than the gradient observed since the last "
            "step (it was not empty before, or batches of different sizes, several draws or observe() contributed), "
            "so the gradient of the step is ambiguous. Call optimizer.zero_grad() after each step, and change p.grad "
            "inside each block, after its backward pass; or clip by max_grad_norm."
        )
    part = observations.parts[0]
    assert left.weight is not None
    mean = {
        name: at_least_float32(present[name]) / left.weight if name in present else value
        for name, value in part.moments.mean.items()
    }
    new = Observed(replace(part.moments, mean=mean), part.noise)
    gradients = dict(left.gradients) | copied(present)
    return replace(observations, parts=[new]), replace(left, gradients=gradients, due=left.due and gradients)


def _refuse_emptied(present: Mapping[str, Tensor], left: Left) -> None:
    """Raise if all recorded gradients are gone or zero.

    Raises:
        UsageError: they are.
    """
    if not any(bool(g.any()) for g in present.values()) and any(bool(g.any()) for g in left.gradients.values()):
        raise UsageError(
            "p.grad was emptied between the backward pass and the step, for example by model.zero_grad(): call it "
            "after step(), or before backward()."
        )


def warn_of_unused(parameters: Mapping[str, Tensor], used: Mapping[str, Tensor]) -> bool:
    """Warn if `p.grad` holds gradients of no recorded pass; return whether it does.

    Args:
        parameters: those that are trained, by name.
        used: what was in `p.grad` at the last step, which may be there still.
    """
    present = gradients_in(parameters)
    if not any(bool(g.any()) for g in present.values()) or not is_changed(present, used):
        return False
    warn(
        "p.grad holds gradients from outside sampled_params(train=True), which the step ignores: observe() does not "
        "read p.grad, and a block starts from its own passes. Add the gradient of a penalty after such a block, "
        "before step(); call optimizer.zero_grad() to empty p.grad.",
        UnusedGradientWarning,
    )
    return True


def without_dropped(
    observations: Observations, left: Left, parameters: Mapping[str, Tensor], *, several_processes: bool
) -> Observations:
    """Return the observations without the parameters whose `p.grad` was set to None, which are not updated.

    Raises:
        UsageError: there are such in one of several processes.
    """
    dropped = {name for name in left.gradients if name in parameters and parameters[name].grad is None}
    if not dropped:
        return observations
    if several_processes:
        raise UsageError(
            f"p.grad of {min(dropped)!r} was set to None in this process, but others may have a gradient: freeze the "
            "parameter, or set p.grad to zero."
        )

    def rest(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: value for name, value in values.items() if name not in dropped}

    return replace(
        observations,
        parts=[
            Observed(Moments(p.moments.losses, rest(p.moments.mean), rest(p.moments.second_moment)), p.noise)
            for p in observations.parts
        ],
    )


def _is_made_of(left: Left, moments: Moments) -> bool:
    """Whether Σ_i c_i g_i is what was left."""
    if left.weight is None:
        return False
    for name, mean in moments.mean.items():
        gradient = left.gradients.get(name)
        due = _due(left, name, mean)
        found = torch.zeros_like(due) if gradient is None else gradient.to(due)
        dtype = due.dtype if gradient is None else gradient.dtype
        largest = max(due.abs().max().item(), found.abs().max().item()) if due.numel() else 0.0
        if due.numel() and (due - found).abs().max().item() > _ROUNDINGS * torch.finfo(dtype).eps * largest:
            return False
    return True


def _due(left: Left, name: str, mean: Tensor) -> Tensor:
    """What the passes add up to for one parameter, in the dtype and on the device of its mean gradient."""
    if left.due is None:
        return mean * ((left.weight or 0.0) * left.scale)
    return left.due[name].to(mean) if name in left.due else torch.zeros_like(mean)


def _added(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The sum of gradients by name, of which each part may lack some."""
    total: dict[str, Tensor] = {}
    for part in parts:
        for name, value in part.items():
            total[name] = total[name] + value if name in total else value
    return total
