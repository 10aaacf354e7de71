"""Errors about the order of the passes of a recording: none, an earlier one, the same one again."""

from __future__ import annotations

from persample.errors import UsageError


class NothingRecordedError(UsageError):
    """No backward pass through the model was recorded."""


class ModelNotCalledError(NothingRecordedError):
    """Nothing was recorded, because the model was not called."""

    def __init__(self) -> None:
        super().__init__(
            "Nothing was recorded, because the model was not called: inside the block, call the model that the "
            "optimizer was given, and loss.backward() on a loss of its outputs. If your code calls only a part of it, "
            "as training_step() of a LightningModule calls self.net, pass that part: VOGN(self.net, ...) in place of "
            "VOGN(self, ...)."
        )


def earlier_pass() -> UsageError:
    """Return the error that says that a backward pass came too late."""
    return UsageError(
        "A backward pass goes through an earlier call of the model, so it is ambiguous which samples belong together: "
        "call backward() after each call of the model, or call it once with all samples."
    )


def second_pass() -> UsageError:
    """Return the error that says that a forward pass was used twice."""
    return UsageError(
        "A second backward pass went through the same forward pass (retain_graph=True): its gradients would count "
        "twice. Sum the losses and call backward() once."
    )
