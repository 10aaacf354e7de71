"""What each backend must serve. What it does not promise it may refuse; what it returns must be right in any case.

A feature is a kind of layer, an option of one, or a way to use one. A case that has no features but promised ones must
not be refused, so that no backend passes by refusing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .truth import Stream

#: Layers and options that the zoo and the drawn architectures know.
LAYERS = frozenset(
    {
        "activation",
        "conv",
        "conv transpose",
        "dropout",
        "embedding",
        "flatten",
        "group norm",
        "layer norm",
        "linear",
        "pooling",
    }
)
OPTIONS = frozenset(
    {
        "3d",
        "dilation",
        "groups",
        "in place",
        "leading dimensions",
        "no affine",
        "no bias",
        "norm shift missing",
        "output padding",
        "padding mode",
        "padding same",
        "padding valid",
        "padding index",
        "random numbers",
        "stride",
    }
)
USES = frozenset({"frozen", "residual", "tied", "twice", "unused", "several inputs", "nn loss"})
LISTED = LAYERS | OPTIONS | USES

#: What only some backends know, each to be served by `loop`.
BEYOND = frozenset(
    {
        "attention",
        "bare parameter",
        "batch norm in eval mode",
        "bilinear",
        "checkpoint",
        "detached use",
        "embedding bag",
        "folded layout",
        "functional in place",
        "functional use",
        "instance norm",
        "method of a module",
        "parametrization",
        "prelu",
        "recurrent",
        "rms norm",
        "sparse",
        "subclass",
        "time-first layout",
    }
)
EVERYTHING = LISTED | BEYOND

#: Uses that cannot be told from others but by the self-check, where the numbers of samples and positions are equal.
ONLY_NUMBERS_TELL = frozenset({"folded layout", "time-first layout"})


@dataclass(frozen=True)
class Promise:
    """What the suite asks of a backend.

    Attributes:
        serves: the features that it must not refuse.
        options: how it is made.
        stream: whence its random numbers come.
    """

    serves: frozenset[str] = frozenset()
    options: dict[str, Any] = field(default_factory=dict)
    stream: Stream = "batch"


_PROMISES = {
    "loop": Promise(serves=EVERYTHING),
    "hooks": Promise(serves=LISTED | {"batch norm in eval mode", "instance norm", "rms norm"}),
    "fused": Promise(serves=LISTED | {"batch norm in eval mode", "instance norm", "rms norm", "subclass"}),
    "vmap": Promise(
        # torch.func cannot run recurrent layers, sparse gradients and hooks on saved tensors.
        serves=EVERYTHING - {"checkpoint", "recurrent", "sparse"},
        options={"randomness": "same"},
        stream="each",
    ),
    # BackPACK computes embeddings in the default dtype only, and the suite is in float64.
    "backpack": Promise(
        serves=LISTED
        - {"embedding", "group norm", "layer norm", "output padding", "padding index", "padding mode", "padding same"}
    ),
    "opacus": Promise(serves=LISTED - {"norm shift missing", "padding index", "padding mode"}),
}


def promise_of(backend: str) -> Promise:
    """Return the promise of `backend`; a third party's one promises nothing and must be right where it answers."""
    return _PROMISES.get(backend, Promise())
