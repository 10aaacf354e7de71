"""Sources of per-sample gradients: one file or folder per backend, and the registry that picks one by name.

How a call travels:

1. `source` (`PerSampleGradSource`) makes a `Batch`, refuses what no backend can do (`model`), and guards the model.
2. The backend (`backends`) computes. Those of the project's own see each *use* of a parameter (capture), whose *rule*
   puts a *tap* at the result. In the backward pass the tap turns the gradient δ there into a *contribution*; the
   *accumulator* adds the uses of a parameter up for each sample, and squares after that.
3. On the first batch of its kind, `selfcheck` compares the result with ordinary gradients and a loop over samples.

`contract` is what a backend implements, `splits` says where the samples are in a batch, and `recording` watches forward
and backward passes that users run.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from persample.sources.batch import Batch as Batch
from persample.sources.model.usage import Use as Use
from persample.sources.recording.results import Recorded as Recorded
from persample.sources.registry import Backend as Backend
from persample.sources.registry import make_source as make_source
from persample.sources.registry import register_backend as register_backend
from persample.sources.source import PerSampleGradSource as PerSampleGradSource
from persample.sources.splits.wrappers import batched as batched
from persample.sources.splits.wrappers import one_per_sample as one_per_sample
from persample.sources.splits.wrappers import shared as shared

if TYPE_CHECKING:
    from persample.sources.backends.external.backpack import BackpackSource as BackpackSource
    from persample.sources.backends.external.opacus import OpacusSource as OpacusSource
    from persample.sources.backends.external.source import PeerSource as PeerSource
    from persample.sources.backends.fused import FusedSource as FusedSource
    from persample.sources.backends.hooks import HooksSource as HooksSource
    from persample.sources.backends.loop import LoopSource as LoopSource
    from persample.sources.backends.vjp import VjpSource as VjpSource
    from persample.sources.backends.vmap import VmapSource as VmapSource

#: The classes of the backends, by the modules they are in. A backend imports its package only when it is asked for.
_BACKENDS = {
    "BackpackSource": "external.backpack",
    "FusedSource": "fused",
    "HooksSource": "hooks",
    "LoopSource": "loop",
    "OpacusSource": "external.opacus",
    "PeerSource": "external.source",
    "VjpSource": "vjp",
    "VmapSource": "vmap",
}


def __getattr__(name: str) -> Any:
    if name not in _BACKENDS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"persample.sources.backends.{_BACKENDS[name]}"), name)
