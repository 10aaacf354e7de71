"""Every example runs, with tiny settings, and shows what it is there to show."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """One thread, which is faster for small tensors; global noise as it was; files go to an empty folder."""
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        yield
    torch.set_num_threads(threads)


def test_every_example_has_a_test_and_a_title() -> None:
    tests = Path(__file__).read_text(encoding="utf-8")
    for path in EXAMPLES.glob("*.py"):
        assert f'load("{path.stem}")' in tests
        title, line = path.read_text(encoding="utf-8").splitlines()[1:3]
        assert line == "=" * len(title)


def test_plain_loop() -> None:
    assert load("plain_loop").main(["--epochs", "2", "--batch-size", "100", "--out", "unsure.png"]) < 1.0
    assert Path("unsure.png").stat().st_size > 10_000


def test_mislabelled_digits() -> None:
    assert load("mislabelled_digits").main(["--epochs", "2", "--out", "found.png"]) > 0.5
    assert Path("found.png").stat().st_size > 10_000


def test_attribution() -> None:
    assert load("attribution").main(["--epochs", "1", "--size", "128", "--out", "attribution.png"]) > 0.5
    assert Path("attribution.png").stat().st_size > 10_000


def test_continual_learning() -> None:
    few = ["--tasks", "2", "--epochs", "2", "--strength", "30", "--out", "continual.png"]
    without, with_ewc = load("continual_learning").main(few).values()
    assert with_ewc > 0.5
    assert without > 0.5
    assert Path("continual.png").stat().st_size > 10_000


def test_merging() -> None:
    accuracies = load("merging").main(["--epochs", "1", "--out", "merging.png"])
    assert min(accuracies["Fisher-weighted"]) > max(accuracies["before"])
    assert Path("merging.png").stat().st_size > 10_000


@pytest.mark.filterwarnings("ignore::UserWarning")  # of the accountant, about its grid of orders
def test_private_digits() -> None:
    pytest.importorskip("opacus")
    courses = load("private_digits").main(["--epochs", "2", "--noise", "0", "1.5", "--out", "private.png"])
    (free, _), (private, budgets) = courses.values()
    assert free[-1] > 0.5
    assert private[-1] > 0.4
    assert 0 < budgets[0] < budgets[1] < 3
    assert Path("private.png").stat().st_size > 10_000


def test_near_duplicates() -> None:
    by_gradients, _ = load("near_duplicates").main(["--samples", "300", "--out", "duplicates.png"])
    assert by_gradients > 0.8
    assert Path("duplicates.png").stat().st_size > 10_000


def test_noise_scale() -> None:
    scales = load("noise_scale").main(["--epochs", "1", "--out", "scale.png"])
    assert scales[-1] > scales[0] > 0
    assert Path("scale.png").stat().st_size > 10_000


@pytest.mark.filterwarnings("ignore")  # of Lightning's, about loggers, workers and devices
def test_lightning_module() -> None:
    pytest.importorskip("lightning")
    assert load("lightning_module").main(["--epochs", "1"]) < 1.0


@pytest.mark.filterwarnings("ignore")
def test_hugging_face_trainer() -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    assert load("hugging_face_trainer").main(["--epochs", "3", "--samples", "1000"]) < 0.69


@pytest.mark.filterwarnings("ignore")
def test_bayesian_lora() -> None:
    pytest.importorskip("peft")
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    seen, others = load("bayesian_lora").main(["--epochs", "20"])
    assert others > 1.5 * seen


def test_regression_bands(tmp_path: Path) -> None:
    predicted = load("regression_bands").main(["--steps", "200", "--out", str(tmp_path / "bands.png")])
    inside, outside = predicted.epistemic_variance[150:210].mean(), predicted.epistemic_variance[[0, -1]].mean()
    assert outside > 4 * inside
    assert (tmp_path / "bands.png").stat().st_size > 10_000


def test_out_of_distribution(real_data: Path, tmp_path: Path) -> None:
    small = ["--samples", "300", "--epochs", "1", "--test-samples", "100"]
    areas = load("out_of_distribution").main(["--data-dir", str(real_data), *small, "--out", str(tmp_path / "ood.png")])
    assert list(areas) == ["entropy at the mean", "entropy of the average", "mutual information"]
    assert all(0 <= area <= 1 for area in areas.values())
    assert (tmp_path / "ood.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("inside", "outside"),
    [([0.0, 1.0, 2.0], [3.0, 4.0]), ([0.0, 1.0], [1.0, 1.0, 0.0]), ([2.0], [1.0]), ([1.0, 1.0], [1.0])],
)
def test_auroc_counts_pairs(inside: list[float], outside: list[float]) -> None:
    area: Callable[[Tensor, Tensor], Any] = load("out_of_distribution").auroc
    pairs = [1.0 * (o > i) + 0.5 * (o == i) for i in inside for o in outside]
    assert area(torch.tensor(inside), torch.tensor(outside)) == pytest.approx(sum(pairs) / len(pairs))


@pytest.mark.filterwarnings("ignore")  # of wrong settings
def test_tuning(tmp_path: Path) -> None:
    load("tuning").main(["--epochs", "1", "--out", str(tmp_path)])
    pictures = list(tmp_path.glob("tuning-*.png"))
    assert len(pictures) == 6
    assert all(picture.stat().st_size > 10_000 for picture in pictures)


def test_tuning_shows_what_it_says() -> None:
    tuning = load("tuning")
    good, *bad = (
        tuning.train(6, **settings) for settings in ({}, {"data_size": 32}, {"lr": 1e-4}, {"temperature": 20.0})
    )
    assert all(course.test[-1] > good.test[-1] + 0.1 for course in bad)
