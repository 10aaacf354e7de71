from __future__ import annotations

from typing import get_args

import torch

from persample.experiments.seeds import Purpose, derive_seed, make_generator


def test_every_purpose_epoch_and_seed_has_numbers_of_its_own() -> None:
    seeds = [
        derive_seed(seed, purpose, epoch)
        for seed in (0, 1, 2, 2**32)
        for purpose in get_args(Purpose)
        for epoch in range(20)
    ]

    assert len(set(seeds)) == len(seeds)


def test_the_same_arguments_give_the_same_numbers() -> None:
    first, second = make_generator(3, "noise"), make_generator(3, "noise")

    assert torch.rand(5, generator=first).equal(torch.rand(5, generator=second))


def test_stays_the_same_from_version_to_version() -> None:
    assert derive_seed(0, "order", 1) == 10236345654442229010
