"""Runs that are killed by SIGKILL go on from their checkpoint, and end bit for bit as if nothing had happened."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.skipif(os.name != "posix", reason="SIGKILL and fork are of POSIX")

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def same(one: Any, other: Any) -> bool:
    """Whether nested containers are equal bit for bit."""
    if isinstance(one, torch.Tensor):
        return one.equal(other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def test_at_random_moments(tmp_path: Path) -> None:
    script = Path(__file__).with_name("killed_run.py")
    subprocess.run([sys.executable, str(script), str(tmp_path)], env=ENVIRONMENT, timeout=180, check=True)
    assert int((tmp_path / "kills").read_text()) >= 3
    straight, killed = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("straight", "killed"))
    assert straight["epoch"] == 10
    assert same(straight, killed)


def test_a_killed_process_of_two_ends_the_command_and_it_can_be_resumed(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    few = ["--epochs", "2", "--batch-size", "1000", "--train-draws", "1", "--test-draws", "1"]
    command = [*torchrun, "-m", "persample", "train", *few, "--out", str(tmp_path / "out")]
    with subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        for line in run.stdout:
            if line.startswith("vogn epoch 1/2"):
                break
        children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
        run.communicate(timeout=120)
    assert run.returncode != 0
    assert not (tmp_path / "out" / "metrics.csv").exists()

    again = subprocess.run(
        [*command, "--resume"], env=ENVIRONMENT, capture_output=True, text=True, timeout=180, check=False
    )
    assert again.returncode == 0, again.stderr
    with (tmp_path / "out" / "metrics.csv").open() as file:
        assert {row["epoch"] for row in csv.DictReader(file)} == {"1", "2"}
