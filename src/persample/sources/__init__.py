"""Sources of per-sample gradients: one file per backend, and the registry that picks one by name."""

from persample.sources.batch import Batch as Batch
from persample.sources.registry import Backend as Backend
from persample.sources.registry import make_source as make_source
from persample.sources.registry import register_backend as register_backend
from persample.sources.source import PerSampleGradSource as PerSampleGradSource
from persample.sources.splits.wrappers import batched as batched
from persample.sources.splits.wrappers import one_per_sample as one_per_sample
from persample.sources.splits.wrappers import shared as shared
