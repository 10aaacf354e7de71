"""Models drawn by chance: every backend is right on them, or refuses them."""

from __future__ import annotations

import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from .architectures import cases
from .backend_promises import promise_of
from .case import Case, Method, assert_right_or_refused


@pytest.mark.parametrize("method", ["moments", "per_sample"])
@given(case=cases(), data=st.data())
def test_is_right_or_refuses(backend: str, method: Method, case: Case, data: st.DataObject) -> None:
    # What a backend promises is right by itself. Beyond, the self-check is part of being right or refusing.
    promised = case.features <= promise_of(backend).serves
    check = data.draw(st.sampled_from(["first", "never"])) if promised else "first"
    served = assert_right_or_refused(backend, case, method, check)
    event("served" if served else "refused")
