"""Choices of the settings that VOGN and OGN share, to compare both with their transcriptions."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st


@st.composite
def shared_settings(draw: st.DrawFn) -> dict[str, Any]:
    """Settings under which the steps move far, but do not diverge, which would blow rounding errors up."""
    data_size = draw(st.integers(5, 500))
    prior = draw(st.floats(0.05, 1))  # λ/N
    return {
        "data_size": data_size,
        "augmentation": draw(st.sampled_from([1.0, 2.5, 10.0])),
        "prior_precision": prior * data_size,
        "prior_mean": draw(st.sampled_from([0.0, 0.7, -1.5])),
        "lr": prior * draw(st.floats(0, 0.02)),
        "decay": draw(st.floats(0.5, 1)),
        "hess_init": draw(st.floats(0.05, 2)),
        "momentum": draw(st.sampled_from([0.0, 0.5, 0.9])),
        "bias_correction": draw(st.booleans()),
        "average_prior": draw(st.booleans()),
        "order": draw(st.sampled_from(["printed", "updated"])),
        "damping": draw(st.sampled_from([0.0, 1e-3, 0.3])),
        "temperature": draw(st.sampled_from([1.0, 0.1, 3.0])),
        "temperature_start": draw(st.sampled_from([0.01, 0.5])),
        "temperature_steps": draw(st.sampled_from([0, 1, 5, 100])),
        "max_update": draw(st.sampled_from([None, 0.05, 2.0])),
        "max_grad_norm": draw(st.sampled_from([None, 0.1, 10.0])),
    }


# Settings, and a change of them that must change the result.
CHANGES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {"augmentation": 3.0}),
    ({}, {"prior_mean": 1.0}),
    ({}, {"momentum": 0.9}),
    ({"momentum": 0.9}, {"bias_correction": False}),
    ({"momentum": 0.9}, {"average_prior": True}),
    ({}, {"order": "updated"}),
    ({}, {"damping": 0.1}),
    ({}, {"temperature": 0.5}),
    ({}, {"temperature_steps": 3}),
    ({"temperature_steps": 3}, {"temperature_start": 0.5}),
    ({}, {"max_update": 0.1}),
    ({}, {"max_grad_norm": 0.1}),
]
