"""What recorded backward passes left in `p.grad`, and whether it was changed since."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

# Rounding of a product or a sum, in units of the last place.
_ULPS = 8


def gradients_in(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return `p.grad` by name, for parameters that have one."""
    return {name: p.grad.detach().to_dense() for name, p in parameters.items() if p.grad is not None}


def copied(gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies."""
    return {name: g.clone() for name, g in gradients.items()}


def is_changed(present: Mapping[str, Tensor], left: Mapping[str, Tensor]) -> bool:
    """Whether a gradient of `present` differs from that in `left` beyond rounding; a missing one counts as zero.

    Gradients that are not there any more are passed over, and those of a pass that overflowed.
    """
    both = [name for name in present if name in left]
    if any(bool(g.any()) for name, g in present.items() if name not in left):
        return True
    if not both:
        return False
    now, then = [present[name] for name in both], [left[name].to(present[name]) for name in both]  # as the model is now
    if _equal(now, then) or not all(bool(t.isfinite().all()) for t in then):
        return False
    return not all(a.shape == b.shape and _close(a, b) for a, b in zip(now, then, strict=True))


def _equal(one: list[Tensor], other: list[Tensor]) -> bool:
    """Whether all are equal, bit for bit, with a single synchronisation on accelerators."""
    if all(t.device.type == "cpu" for t in one):
        return all(map(torch.equal, one, other))
    if any(a.shape != b.shape for a, b in zip(one, other, strict=True)):
        return False
    distances = torch._foreach_norm(torch._foreach_sub(one, other), 1)
    return torch.stack([d.to(distances[0].device, torch.float64) for d in distances]).sum().item() == 0


def _close(present: Tensor, left: Tensor) -> bool:
    allowed = _ULPS * torch.finfo(left.dtype).eps
    return bool(((present - left).abs() <= allowed * left.abs()).all())
