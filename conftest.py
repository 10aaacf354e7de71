"""Run the Python blocks of README and docs, and the examples in docstrings."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from sybil import Sybil
from sybil.parsers.myst import PythonCodeBlockParser, SkipParser
from sybil.parsers.rest import DocTestParser
from sybil.sybil import SybilCollection

from persample.sources import registry

pytest_plugins = ["persample.testing.fixtures"]


@pytest.fixture(scope="module")
def global_state() -> Iterator[None]:
    """Backends that a page registers are forgotten at its end; small tensors are computed faster by one thread."""
    registered, threads = dict(registry._registered), torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    registry._registered.clear()
    registry._registered.update(registered)


pytest_collect_file = SybilCollection(
    [
        Sybil(
            parsers=[PythonCodeBlockParser(), SkipParser()],
            patterns=["README.md", "docs/*.md", "docs/*/*.md"],
            fixtures=["global_state"],
        ),
        Sybil(parsers=[DocTestParser()], path="src", pattern="*.py"),
    ]
).pytest()
