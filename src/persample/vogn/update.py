"""One step of VOGN for a parameter group: from its settings, states and moments to new means and new states."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from persample.vogn.core import Tensors, average_gradient, vogn_update


def update_group(
    group: Mapping[str, Any],
    data_size: int,
    params: list[Tensor],
    states: list[dict[str, Any]],
    gradient: Tensors,
    second_moment: Tensors,
) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """Lines 6 and 7, with momentum, for the parameters of one group. Changes nothing that is passed in.

    Args:
        group: the settings lr, prior_precision, decay, momentum and order.
        data_size: N.
        params: the means μ_t.
        states: of each parameter the "step" count, the "curvature" s_t, and after momentum was used the running mean
            "momentum_buffer" and its "momentum_mass" (see `average_gradient`).
        gradient: ĝ.
        second_moment: h.

    Returns:
        The new means, in the dtypes of `params`, and the new states.
    """
    new_states: list[dict[str, Any]] = [{"step": state["step"] + 1} for state in states]
    curvature = [state["curvature"] for state in states]
    if group["momentum"] > 0 or any("momentum_buffer" in state for state in states):
        buffers, masses, gradient = average_gradient(
            [
                state["momentum_buffer"] if "momentum_buffer" in state else torch.zeros_like(state["curvature"])
                for state in states
            ],
            [state.get("momentum_mass", 0.0) for state in states],
            gradient,
            momentum=group["momentum"],
        )
        for new, buffer, mass in zip(new_states, buffers, masses, strict=True):
            new |= {"momentum_buffer": buffer, "momentum_mass": mass}
    new_means, new_curvature = vogn_update(
        [p.to(s.dtype) for p, s in zip(params, curvature, strict=True)],
        curvature,
        gradient,
        second_moment,
        data_size=data_size,
        lr=group["lr"],
        prior_precision=group["prior_precision"],
        decay=group["decay"],
        order=group["order"],
    )
    for new, s in zip(new_states, new_curvature, strict=True):
        new["curvature"] = s
    return [mean.to(p.dtype) for mean, p in zip(new_means, params, strict=True)], new_states
