"""Where the samples are in a tensor of a forward pass, or why that is not known."""

from __future__ import annotations

from typing import NamedTuple

from persample.sources.backends.fused.layout import Layout


class Lost(NamedTuple):
    """The tensor depends on the batch, but the position of the samples in it is unknown.

    Attributes:
        reason: why, for the error message.
        mixed: whether samples met there, rather than that a single number was made from all of them (a maximum, which
            is subtracted from everything), or no trace was left.
        pending: where the samples are, if all that is missing is to whom some rows belong that parameters and constants
            made: that is known once they meet those of a sample.
        picked: whether they met because rows had been picked, so that one sample's met those of another.
    """

    reason: str
    mixed: bool = False
    pending: Layout | None = None
    picked: bool = False


Where = Layout | Lost | None
"""Where the samples are in a tensor; None if it holds none."""


NO_TRACE = Lost("its results do not show what they depend on")


def without_owner(layout: Layout) -> Lost:
    """Return the layout of a result computed from parameters and rows of which some have no owner."""
    return Lost(
        "some rows come from parameters alone and were combined with rows of no sample", mixed=True, pending=layout
    )
