"""Pytest fixtures for tests of backends of one's own: `pytest_plugins = ["persample.testing.fixtures"]`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from persample.testing import trace, truth


@pytest.fixture
def no_trace() -> Callable[..., Any]:
    """A context in which nothing about a model may change, see `persample.testing.no_trace`."""
    return trace.no_trace


@pytest.fixture
def per_sample_truth() -> Callable[..., truth.Truth]:
    """The gradients of the single samples by an independent loop, see `persample.testing.per_sample_truth`."""
    return truth.per_sample_truth
