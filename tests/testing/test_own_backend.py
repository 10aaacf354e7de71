"""The backend that the documentation writes passes the suite as the documentation says to run it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "howto" / "own-backend.md"
pytest_plugins = ["pytester"]


def test_the_documented_backend_passes_the_documented_suite(pytester: pytest.Pytester) -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    backend, suite = blocks[0], next(block for block in blocks if "BackendSuite" in block)
    registration = 'import persample\npersample.register_backend("identity", f"{__name__}:IdentitySource")\n'
    pytester.makepyfile(test_identity=f"{backend}\n{registration}\n{suite}")
    pytester.makeconftest(
        'from hypothesis import settings\nsettings.register_profile("few", max_examples=10, deadline=None)\n'
    )
    result = pytester.runpytest_subprocess("--hypothesis-profile=few", "-q", "-k", "not zoo or Linear or BatchNorm")
    outcomes = result.parseoutcomes()
    assert outcomes.get("passed", 0) > 30, result.stdout.str()
    assert set(outcomes) <= {"passed", "deselected", "warnings", "warning"}, result.stdout.str()
