from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from persample.errors import OptionError
from persample.experiments.data import ImageDataset, hold_out
from persample.experiments.seeds import make_generator


def test_every_training_sample_lands_in_one_part_with_its_class(digits: ImageDataset) -> None:
    numbered = replace(digits, train_inputs=torch.arange(40.0), train_targets=torch.arange(40))

    split = hold_out(numbered, 12, make_generator(3, "validation"))

    assert split.held_out == "validation"
    assert (len(split.train_targets), len(split.test_targets)) == (28, 12)
    assert torch.cat([split.train_targets, split.test_targets]).sort().values.equal(torch.arange(40))
    assert split.train_inputs.equal(split.train_targets.float())
    assert split.test_inputs.equal(split.test_targets.float())


def test_the_generator_chooses_the_samples(digits: ImageDataset) -> None:
    first, again, other = (hold_out(digits, 12, make_generator(seed, "validation")) for seed in (3, 3, 4))

    assert first.test_inputs.equal(again.test_inputs)
    assert not first.test_inputs.equal(other.test_inputs)


def test_nothing_held_out_leaves_the_data_as_they_are(digits: ImageDataset) -> None:
    assert hold_out(digits, 0, make_generator(3, "validation")) is digits


def test_something_must_be_left_to_train_on(digits: ImageDataset) -> None:
    with pytest.raises(OptionError, match=r"validation=40 leaves none of the 40 training samples"):
        hold_out(digits, 40, make_generator(3, "validation"))
