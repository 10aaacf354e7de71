"""The models of transformers as their authors wrote them: fused is exact on all, the others are exact or refuse."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch

import persample
from persample.errors import UnsupportedModelError

pytest.importorskip("transformers", reason="transformers is not installed (extra real-models)")

from .exactness import assert_exact
from .from_transformers import MODELS, WITH_BATCH_NORM, RealModel

ALL = MODELS | WITH_BATCH_NORM
SIZE = 3

pytestmark = pytest.mark.filterwarnings("ignore")


def made(entry: RealModel, training: bool) -> tuple[Any, Any]:
    torch.manual_seed(0)
    return entry.build().train(training), entry.inputs(SIZE)


@pytest.mark.parametrize("name", ALL)
def test_fused_is_exact_in_eval_mode(name: str, per_sample_truth: Any, no_trace: Any) -> None:
    model, inputs = made(ALL[name], training=False)
    truth = per_sample_truth(model, ALL[name].loss, inputs, None)
    assert_exact("fused", model, ALL[name].loss, inputs, truth, no_trace, rounding=ALL[name].rounding)


@pytest.mark.parametrize("name", MODELS)
def test_fused_is_exact_in_training_mode(name: str, per_sample_truth: Any, no_trace: Any) -> None:
    """Dropout draws what it would draw in one ordinary forward pass over the batch."""
    model, inputs = made(MODELS[name], training=True)
    truth = per_sample_truth(model, MODELS[name].loss, inputs, None, stream="batch")
    assert_exact("fused", model, MODELS[name].loss, inputs, truth, no_trace, rounding=MODELS[name].rounding)


@pytest.mark.parametrize("name", WITH_BATCH_NORM)
def test_batch_norm_in_training_mode_is_refused(backend: str, name: str) -> None:
    model, inputs = made(WITH_BATCH_NORM[name], training=True)
    with pytest.raises(UnsupportedModelError, match=r"BatchNorm2d '.*' is in training mode"):
        persample.make_source(backend, model, WITH_BATCH_NORM[name].loss).moments(inputs, None)


@pytest.mark.parametrize("batch_norm", ["group_norm", "frozen"])
@pytest.mark.parametrize("name", WITH_BATCH_NORM)
def test_fused_is_exact_in_training_mode_once_fixed(
    name: str, batch_norm: Any, per_sample_truth: Any, no_trace: Any
) -> None:
    model, inputs = made(WITH_BATCH_NORM[name], training=True)
    fixed = persample.fix(model, batch_norm).model
    truth = per_sample_truth(fixed, WITH_BATCH_NORM[name].loss, inputs, None, stream="batch")
    assert_exact("fused", fixed, WITH_BATCH_NORM[name].loss, inputs, truth, no_trace)


@pytest.mark.parametrize("name", ALL)
def test_other_backends_are_exact_or_refuse(backend: str, name: str, per_sample_truth: Any, no_trace: Any) -> None:
    model, inputs = made(ALL[name], training=False)
    truth = per_sample_truth(model, ALL[name].loss, inputs, None)
    with contextlib.nullcontext() if backend in ("loop", "fused") else contextlib.suppress(UnsupportedModelError):
        entry = ALL[name]
        assert_exact(backend, model, entry.loss, inputs, truth, no_trace, rounding=entry.rounding, check="first")
