"""Every backend on every named model: right or refused, and what it promises is served."""

from __future__ import annotations

import pytest

from .case import Method, assert_right_or_refused
from .zoo import ZOO


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("method", ["moments", "per_sample"])
def test_is_right_or_refuses(backend: str, method: Method, name: str) -> None:
    for size in (1, 3):
        assert_right_or_refused(backend, ZOO[name].case(size), method)
