"""The zoo: every architecture that the suite asks a backend for, by name."""

from __future__ import annotations

from persample.testing.zoo import (
    attention,
    calls,
    convolution,
    embedding,
    fields,
    generative,
    impossible,
    inputs,
    layouts,
    linear,
    normalization,
    parameters,
    precision,
    recurrent,
    regressions,
    uses,
)
from persample.testing.zoo.case import Case as Case

#: Cases by what they show.
FAMILIES: dict[str, tuple[Case, ...]] = {
    "Linear layers": linear.CASES,
    "Convolutions": convolution.CASES,
    "Embeddings": embedding.CASES,
    "Normalisations": normalization.CASES,
    "Attention": attention.ATTENTION,
    "Transformers": attention.TRANSFORMERS,
    "Recurrent layers": recurrent.CASES,
    "Residuals and branches": uses.RESIDUALS,
    "Operations in place": uses.IN_PLACE,
    "Layers used several times": uses.SEVERAL_USES,
    "Ways to call a layer": calls.CALLS,
    "Samples that are not in dim 0 of the inputs": inputs.CASES,
    "Frozen and unused parameters": calls.FROZEN_AND_UNUSED,
    "Random numbers": calls.DROPOUT,
    "Parameters outside layers": parameters.BARE,
    "Parameters computed from others": parameters.COMPUTED,
    "Inner layouts": layouts.CASES,
    "Generative and implicit models": generative.CASES,
    "Models of many fields": fields.CASES,
    "Precision": precision.CASES,
    "What once went wrong": regressions.CASES,
    "What has no per-sample gradient": impossible.CASES,
}

#: All cases by name.
ZOO: dict[str, Case] = {case.name: case for cases in FAMILIES.values() for case in cases}
