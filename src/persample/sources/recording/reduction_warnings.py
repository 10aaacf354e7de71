"""Warnings of losses that may be no mean over the samples."""

from __future__ import annotations

import math
from collections.abc import Iterable

from persample.sources.recording.forward_pass import ForwardPass
from persample.warn import warn


class LossReductionWarning(UserWarning):
    """The loss may not be the mean over the samples that the model was called with."""


def warn_of_samples(passes: Iterable[ForwardPass]) -> None:
    """Warn if the loss does not depend on all samples of a pass."""
    for forward_pass in passes:
        covered, size = forward_pass.covered, forward_pass.batch.size
        if covered is not None and not bool(covered.all()):
            warn(
                f"The loss does not depend on {int((~covered).sum())} of the {size} samples that the model was "
                f'called with. With loss_reduction="mean" it is taken as a mean over all {size}: if it is one over '
                'fewer, sum the losses and say loss_reduction="sum".',
                LossReductionWarning,
            )
            return


def warn_of_divisor(passes: Iterable[ForwardPass]) -> None:
    """Warn if the losses were divided, as if gradients were accumulated."""
    done = [p for p in passes if p.done]
    if len(done) == 1 and done[0].added and done[0].divisor > 1.5 and done[0].divisor.is_integer():
        warn(
            f"The loss was divided by {done[0].divisor:g}, as if it were one of several whose gradients are "
            "accumulated, but only this one was observed, and counts as if it were the whole. With Lightning, the "
            "Trainer of Hugging Face or Accelerate use persample.integrations; in a loop of your own say "
            f"sampled_params(train=True, redraw=False, loss_scale=1 / {done[0].divisor:g}) for each of the parts, "
            "or give the undivided parts inside of one block.",
            LossReductionWarning,
        )
    if len(done) > 1 and all(math.isclose(p.divisor, len(done), rel_tol=1e-5) for p in done):
        warn(
            f"The losses of {len(done)} backward passes were each divided by {len(done)}. The optimizer already "
            "averages them, weighted by their numbers of samples, so do not divide them.",
            LossReductionWarning,
        )
