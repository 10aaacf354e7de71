"""The command for a visit to a GPU, rehearsed without one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from persample.sources.backends.fused.replay import untried

COMMAND = [sys.executable, str(Path(__file__).parents[1] / "benchmarks" / "on_gpu.py")]


def test_it_measures_tests_and_goes_on(tmp_path: Path) -> None:
    command = [*COMMAND, "--device", "cpu", "--quick", "--out", str(tmp_path)]
    subprocess.run(command, check=True, timeout=300)
    report = json.loads((tmp_path / "report.json").read_text())
    parts = report["parts"]
    assert parts["MNIST ConvNet: own"]["moments"]["fused"]["ratio"] > 0
    if untried.DYNAMO_SEES_CHANGES:
        assert parts["MNIST ConvNet: own"]["steps"]["VOGN, replayed"]["ratio"] > 0
    assert parts["MNIST ConvNet: others"]["moments"]["vmap"]["ratio"] > 0
    for name in ("newest tests", "tests"):
        assert "passed" in parts[name]["summary"]
        assert parts[name]["failed"] == []
    text = (tmp_path / "report.md").read_text()
    assert text.count("| MNIST ConvNet | 4 |") == 4  # times and memory, of moments and steps
    assert "MNIST ConvNet, VOGN:" in text  # where the time goes
    assert (tmp_path / "picture.png").stat().st_size > 1000

    del parts["tests"]
    (tmp_path / "report.json").write_text(json.dumps(report))
    again = subprocess.run(command, check=True, timeout=300, capture_output=True, text=True)
    assert "tests: done" in again.stdout
    assert "ConvNet: own: done" not in again.stdout, "what is there is not measured again"


def test_it_stops_in_time_and_keeps_what_it_has(tmp_path: Path) -> None:
    command = [*COMMAND, "--device", "cpu", "--quick", "--minutes", "0.1", "--out", str(tmp_path)]
    assert subprocess.run(command, check=False, timeout=60).returncode == 4  # parts
    report = json.loads((tmp_path / "report.json").read_text())
    assert {part["problem"] for part in report["parts"].values()} == {"no time was left"}
    assert "- tests: no time was left" in (tmp_path / "report.md").read_text()


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
