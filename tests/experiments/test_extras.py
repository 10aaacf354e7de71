from __future__ import annotations

import json

import pytest

from persample.errors import MissingPackageError
from persample.experiments.extras import require


def test_imports_what_is_there() -> None:
    assert require("json", "Reading") is json


def test_says_what_to_install() -> None:
    with pytest.raises(MissingPackageError, match=r'^Drawing cannot .*run: pip install "persample\[exper'):
        require("a_package_that_nobody_has", "Drawing")
