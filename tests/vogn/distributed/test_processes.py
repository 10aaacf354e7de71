"""Several real processes train one posterior: as one process would with the same draws, and again after a death."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from persample.errors import UsageError
from persample.vogn.distributed import noise_of_rank

from . import ranks

SCRIPT = Path(ranks.__file__)
STEPS = 4
ALL_WAYS = [argument for way in ranks.WAYS for argument in ("--way", way)]

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def run_ranks(processes: int, folder: Path, *arguments: str) -> list[Any]:
    """Start the processes, and return what each has written down, one entry for each way to observe."""
    command = [sys.executable, str(SCRIPT), str(folder), "--steps", str(STEPS), "--processes", str(processes)]
    subprocess.run([*command, *arguments], env=ENVIRONMENT, timeout=180, check=True)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(processes)]


def by_one_process(processes: int, way: str, rule: str = "VOGN", device: str = "cpu") -> list[list[torch.Tensor]]:
    """The means after each step, if one process observes all batches, each at the draws of the rank that had it."""
    with torch.device(device):  # as the ranks do
        return _by_one_process(processes, way, rule)


def _by_one_process(processes: int, way: str, rule: str) -> list[list[torch.Tensor]]:
    model = ranks.make_model(seed=0)
    optimizer = ranks.make_optimizer(model, rule)
    history = []
    for step in range(STEPS):
        for rank in range(processes):
            optimizer.generator = noise_of_rank(11, rank, step)
            if ranks.SHARES[rank]:
                ranks.observe(optimizer, step, rank, way)
        optimizer.step()
        history.append([p.detach().clone() for p in model.parameters()])
    return history


@pytest.fixture(scope="module")
def by_two(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return run_ranks(2, tmp_path_factory.mktemp("two"), *ALL_WAYS)


@pytest.fixture(scope="module")
def by_four(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return run_ranks(4, tmp_path_factory.mktemp("four"), *ALL_WAYS)


def check(held: list[Any], way: str, rule: str = "VOGN") -> None:
    """All ranks hold the same, bit for bit, and what one process would hold."""
    own = [of_rank[ranks.WAYS.index(way)] for of_rank in held]
    assert all(same(other, own[0]) for other in own[1:])
    for actual, expected in zip(own[0][0], by_one_process(len(held), way, rule), strict=True):
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-13)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("rule", ranks.RULES)
def test_two_gpus_hold_what_one_would(rule: str, tmp_path: Path) -> None:
    held = run_ranks(2, tmp_path, "--gpus", "--rule", rule)
    for actual, expected in zip(held[0][0][0], by_one_process(2, "observe", rule, "cuda:0"), strict=True):
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e.cpu(), rtol=1e-12, atol=1e-13)
    assert same(held[0], held[1])


@pytest.mark.parametrize("way", ranks.WAYS)
def test_two_hold_what_one_would(by_two: list[Any], way: str) -> None:
    check(by_two, way)


@pytest.mark.parametrize("way", ranks.WAYS)
def test_four_hold_what_one_would_though_one_has_no_batch(by_four: list[Any], way: str) -> None:
    check(by_four, way)


def test_two_that_train_by_ivon_hold_what_one_would(tmp_path: Path) -> None:
    held = run_ranks(2, tmp_path, *ALL_WAYS, "--rule", "IVON")
    for way in ranks.WAYS:
        check(held, way, "IVON")


def test_a_death_ends_the_run_and_it_goes_on_from_the_checkpoint(by_two: list[Any], tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    killed = subprocess.run(
        [*torchrun, str(SCRIPT), str(tmp_path), "--steps", str(STEPS), "--die-at", "2"],
        capture_output=True,
        timeout=180,
        env=ENVIRONMENT,
        check=False,
    )
    assert killed.returncode != 0
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]
    straight, resumed = by_two[0][0], run_ranks(2, tmp_path, "--resume")[0][0]
    assert same(straight[0][2:], resumed[0])
    assert same(straight[1:], resumed[1:])


class TestOneProcessAlone:
    """A group of one, in this process."""

    @pytest.fixture
    def group(self, tmp_path: Path) -> Any:
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        yield dist.group.WORLD
        dist.destroy_process_group()

    def test_nothing_observed_is_refused(self, group: Any) -> None:
        optimizer = ranks.make_optimizer(ranks.make_model(0), process_group=group)
        with pytest.raises(UsageError, match="Nothing was observed"):
            optimizer.step()

    def test_its_state_waits_for_the_step(self, group: Any) -> None:
        optimizer = ranks.make_optimizer(ranks.make_model(0), process_group=group)
        ranks.observe(optimizer, 0, 0)
        with pytest.raises(UsageError, match=r"call step\(\) first"):
            optimizer.state_dict()
        optimizer.step()
        optimizer.state_dict()

    def test_is_not_pickled(self, group: Any) -> None:
        optimizer = ranks.make_optimizer(ranks.make_model(0), process_group=group)
        with pytest.raises(UsageError, match="state_dict"):
            pickle.dumps(optimizer)

    def test_recorded_passes_are_what_observing_is(self, group: Any) -> None:
        watched, observed = (ranks.make_optimizer(ranks.make_model(0), process_group=group) for _ in range(2))
        inputs, targets = ranks.batch(0, 0)
        for _ in range(2):
            watched.step(lambda: F.cross_entropy(watched.model(inputs), targets).backward())
            observed.observe(inputs, targets)
            observed.step()
        for p, q in zip(watched.model.parameters(), observed.model.parameters(), strict=True):
            torch.testing.assert_close(p, q)

    def test_frozen_parameters_and_half_precision_are_merged(self, group: Any) -> None:
        model = ranks.make_model(0).bfloat16()
        optimizer = ranks.make_optimizer(model, process_group=group)
        model[0].weight.requires_grad_(False)
        before = model[0].weight.clone()
        inputs, targets = ranks.batch(0, 0)
        optimizer.observe(inputs.bfloat16(), targets)
        optimizer.step()
        assert torch.equal(model[0].weight, before)
        assert optimizer.state[model[2].weight]["step"] == 1


def test_the_noise_depends_on_seed_rank_and_step_alone() -> None:
    def noise(*key: int) -> tuple[float, ...]:
        return tuple(torch.randn(3, generator=noise_of_rank(*key)).tolist())

    assert noise(1, 0, 2) == noise(1, 0, 2)
    assert len({noise(*key) for key in [(1, 0, 2), (1, 1, 2), (2, 0, 2), (1, 0, 3), (1, 2, 0), (1, 1, 0)]}) == 6


def same(one: Any, other: Any) -> bool:
    """Whether nested lists of tensors are equal bit for bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    return len(one) == len(other) and all(map(same, one, other))
