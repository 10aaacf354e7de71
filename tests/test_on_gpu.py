"""The command for a visit to a GPU, rehearsed without one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

COMMAND = [sys.executable, str(Path(__file__).parents[1] / "benchmarks" / "on_gpu.py")]


def test_it_measures_tests_and_goes_on(tmp_path: Path) -> None:
    command = [*COMMAND, "--device", "cpu", "--quick", "--out", str(tmp_path)]
    subprocess.run(command, check=True, timeout=300)
    report = json.loads((tmp_path / "report.json").read_text())
    parts = report["parts"]
    assert parts["MNIST ConvNet"]["moments"]["fused"]["ratio"] > 0
    assert parts["MNIST ConvNet"]["steps"]["VOGN"]["ratio"] > 0
    assert "passed" in parts["tests"]["summary"]
    assert parts["tests"]["failed"] == []
    assert "| MNIST ConvNet | 4 |" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "picture.png").stat().st_size > 1000

    del parts["tests"]
    (tmp_path / "report.json").write_text(json.dumps(report))
    again = subprocess.run(command, check=True, timeout=300, capture_output=True, text=True)
    assert "tests: done" in again.stdout
    assert "ConvNet: done" not in again.stdout, "what is there is not measured again"


def test_without_a_gpu_it_says_how_to_rehearse(tmp_path: Path) -> None:
    done = subprocess.run(
        [*COMMAND, "--device", "cuda", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env={"CUDA_VISIBLE_DEVICES": "", "PATH": ""},
    )
    assert done.returncode == 2
    assert "--device cpu --quick" in done.stderr
