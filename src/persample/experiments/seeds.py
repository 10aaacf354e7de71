"""Independent streams of random numbers, all derived from the one seed of a run."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import torch

Purpose = Literal["weights", "noise", "order", "evaluation", "validation"]


def derive_seed(seed: int, purpose: Purpose, epoch: int = 0) -> int:
    """Return a seed of 64 bits for one purpose in one epoch.

    Args:
        seed: The run's seed, at least 0.
        purpose: What the random numbers are for.
        epoch: The epoch that they are for.
    """
    key = (get_args(Purpose).index(purpose), epoch)
    return int(np.random.SeedSequence(seed, spawn_key=key).generate_state(1, np.uint64)[0])


def make_generator(seed: int, purpose: Purpose, epoch: int = 0) -> torch.Generator:
    """Return a generator seeded by `derive_seed`."""
    return torch.Generator().manual_seed(derive_seed(seed, purpose, epoch))
