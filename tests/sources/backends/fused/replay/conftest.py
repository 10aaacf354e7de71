"""Skips the tests of recorded steps where none are recorded."""

from __future__ import annotations

import pytest

from persample.sources.backends.fused.replay import untried


@pytest.fixture(autouse=True)
def needs_recorded_steps() -> None:
    if not untried.DYNAMO_SEES_CHANGES:
        pytest.skip(f"steps are recorded from PyTorch {untried.OLDEST_PYTORCH} on")
