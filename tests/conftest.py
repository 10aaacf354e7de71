"""How many cases hypothesis draws, and the backends that tests with an argument `backend` run over."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

import persample

# What the tests make lies there. Convolutions round to TF32 unless they are told not to.
if "PERSAMPLE_TEST_DEVICE" in os.environ:
    torch.set_default_device(os.environ["PERSAMPLE_TEST_DEVICE"])
    torch.backends.cudnn.allow_tf32 = False

BESIDE_THE_CHECKOUT = Path(__file__).parents[2] / "shared" / "data"

# Large models are slow to draw, and the time of a case depends on the machine.
_SLOW = (HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much)

# The same cases every time, so that a test run never depends on luck. `--hypothesis-profile=nightly` looks for more.
settings.register_profile("every-run", max_examples=100, derandomize=True, deadline=None, suppress_health_check=_SLOW)
settings.register_profile("nightly", max_examples=2000, deadline=None, suppress_health_check=_SLOW, print_blob=True)
settings.load_profile("every-run")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """End the process after a failed assertion on a GPU, with which every further call fails; xdist starts another."""
    if "PYTEST_XDIST_WORKER" in os.environ and report.failed and "device-side assert" in report.longreprtext:
        os._exit(1)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Return the folder of the real data sets; skip where there is none."""
    folder = Path(os.environ.get("PERSAMPLE_DATA") or BESIDE_THE_CHECKOUT)
    if not folder.is_dir():
        pytest.skip(f"no data sets in {folder}; set PERSAMPLE_DATA to a folder with them")
    return folder


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that has an argument `backend` once for every backend, and for the rules of those with a machinery.

    One that cannot be imported is skipped.
    """
    marks = metafunc.definition.iter_markers("parametrize")
    if "backend" not in metafunc.fixturenames or any("backend" in mark.args[0] for mark in marks):
        return
    backends = []
    for backend in persample.backends().values():
        reason = f"backend {backend.name!r} cannot be imported: {backend.problem}"
        skip = pytest.mark.skipif(not backend.available, reason=reason)
        backends += [pytest.param(name, marks=skip) for name in (backend.name, *backend.names[1:])]
    metafunc.parametrize("backend", backends)
