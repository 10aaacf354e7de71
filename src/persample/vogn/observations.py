"""What was observed since the last step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from persample.moments import Moments, merge_moments
from persample.vogn.sampling import NoiseState


@dataclass(frozen=True)
class Observed:
    """The moments of the gradients at one draw of the weights, or averaged over draws where the rule allows that.

    Attributes:
        moments: over all samples that were observed there.
        noise: ε of the draw, by name; None where the rule does not need it.
    """

    moments: Moments
    noise: Mapping[str, Tensor] | None = None


@dataclass(frozen=True)
class Observations:
    """All observations since the last step; immutable.

    Attributes:
        parts: what was observed; one entry for each draw if the rule keeps draws apart, else at most one.
        draws: where the noise of the latest draws began, one for each.
        without_scaler: whether passes of the user were recorded without a gradient scaler.
    """

    parts: list[Observed] = field(default_factory=list)
    draws: list[NoiseState] = field(default_factory=list)
    without_scaler: bool = False

    def with_more(self, new: Observed, place: int | None) -> Observations:
        """Return the same with more: further samples of the part at `place`, or, if that is None, another part."""
        parts = list(self.parts)
        if place is None:
            parts.append(new)
        else:
            parts[place] = Observed(merge_moments([parts[place].moments, new.moments]), new.noise)
        return replace(self, parts=parts)

    def gradient(self) -> Mapping[str, Tensor]:
        """Return ĝ, averaged over all samples and draws."""
        if len(self.parts) == 1:
            return self.parts[0].moments.mean
        return merge_moments(Moments(part.moments.losses, part.moments.mean, {}) for part in self.parts).mean

    def packed(self) -> dict[str, Any]:
        """Return this as tensors, and lists and dicts of tensors."""
        parts = [
            {
                "losses": part.moments.losses,
                "mean": dict(part.moments.mean),
                "second_moment": dict(part.moments.second_moment),
                "noise": None if part.noise is None else dict(part.noise),
            }
            for part in self.parts
        ]
        return {"parts": parts, "draws": list(self.draws), "without_scaler": self.without_scaler}

    @staticmethod
    def unpacked(packed: Mapping[str, Any]) -> Observations:
        """Undo `packed`."""
        parts = [
            Observed(Moments(part["losses"], part["mean"], part["second_moment"]), part["noise"])
            for part in packed["parts"]
        ]
        return Observations(parts, list(packed["draws"]), packed["without_scaler"])
