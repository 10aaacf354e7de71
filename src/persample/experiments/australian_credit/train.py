"""Training and measuring one run, or all runs, several at a time."""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed

import torch
from torch import Tensor

from persample import losses
from persample.errors import OptionError
from persample.experiments.australian_credit.scores import Run, Score
from persample.experiments.australian_credit.settings import make_model, make_optimizer
from persample.experiments.data.australian import TableDataset
from persample.experiments.seeds import derive_seed, make_generator
from persample.vogn import VariationalOptimizer

_PUBLISHED_DRAWS = 10
_MEASUREMENTS = 100


def train(run: Run, data: TableDataset) -> Score:
    """Train once, and measure. Changes nothing, including torch's global random generator.

    Args:
        run: What to train.
        data: The data.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(run.seed, "weights"))
        model = make_model()
    size = len(data.train_targets)
    optimizer = make_optimizer(run.setting, model, size, make_generator(run.seed, "noise"))
    for epoch in range(run.epochs):
        order = torch.randperm(size, generator=make_generator(run.seed, "order", epoch))
        for rows in order.split(run.setting.batch_size):
            optimizer.observe(data.train_inputs[rows], data.train_targets[rows])
            optimizer.step()
    return measure(run, optimizer, data)


def measure(run: Run, optimizer: VariationalOptimizer, data: TableDataset) -> Score:
    """Return the scores of a trained optimizer.

    Args:
        run: What was trained; the draws are derived from its seed.
        optimizer: With the posterior.
        data: The data.
    """
    generator = make_generator(run.seed, "evaluation")
    draws = _MEASUREMENTS * _PUBLISHED_DRAWS
    size = len(data.train_targets)
    elbo = optimizer.elbo(data.train_inputs, data.train_targets, samples=draws, generator=generator)
    on_test_data = optimizer.posterior.log_likelihoods(
        losses.bernoulli, data.test_inputs, data.test_targets, samples=draws, generator=generator
    ).double()  # (draws, rows)
    return Score(
        run=run,
        negative_elbos=tuple((elbo.kl - part.mean().item()) / size for part in _measurements(elbo.log_likelihoods)),
        test_log_losses=tuple(
            -_log_mean_exp(part).item() / len(data.test_targets) for part in _measurements(on_test_data.sum(1))
        ),
        averaged_log_loss=-_log_mean_exp(on_test_data).mean().item(),
    )


def _measurements(draws: Tensor) -> Sequence[Tensor]:
    """Split a sequence into consecutive measurements."""
    return torch.split(draws, _PUBLISHED_DRAWS)


def _log_mean_exp(values: Tensor) -> Tensor:
    """Logarithm of the mean over dim 0 of the exponentials."""
    return values.logsumexp(0) - math.log(len(values))


def train_all(runs: Sequence[Run], data: TableDataset, *, jobs: int = 1) -> Iterator[Score]:
    """Yield the score of each run as soon as it is known.

    Args:
        runs: What to train.
        data: The data.
        jobs: How many runs at a time, each in a process with one thread.

    Raises:
        OptionError: `jobs` is below 1.
    """
    if jobs < 1:
        raise OptionError(f"jobs={jobs} must be at least 1")
    if jobs == 1:
        yield from (train(run, data) for run in runs)
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=spawn, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            for future in as_completed([pool.submit(train, run, data) for run in runs]):
                yield future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
