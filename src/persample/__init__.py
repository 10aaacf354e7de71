"""Per-sample gradients in PyTorch, and Bayesian deep learning by natural-gradient variational inference.

- `make_source(backend, model, loss_fn)` returns a source, whose `moments` and `per_sample` give the gradients of the
  single samples of a mini-batch. Results match a loop over the samples, or an error says why not.
- `VOGN`, `IVON`, `OGN`, `Vadam` and `MeanFieldVI` are optimizers that train a Gaussian posterior over the weights.
- `explain`, `crosscheck`, `benchmark` and `fix` tell of a model what is served, whether it is right, what it costs,
  and how to replace BatchNorm.

Import from here or from a first-level package (`persample.sources`, `persample.vogn`, …); what lies deeper may move.
`docs/architecture.md` has the map of the code.
"""

from persample import likelihoods as likelihoods
from persample import losses as losses
from persample import metrics as metrics
from persample import plots as plots
from persample import quantities as quantities
from persample.checks import benchmark as benchmark
from persample.checks import crosscheck as crosscheck
from persample.checks import explain as explain
from persample.checks import fix as fix
from persample.curvature import Fisher as Fisher
from persample.curvature import ewc_penalty as ewc_penalty
from persample.curvature import fisher as fisher
from persample.curvature import laplace as laplace
from persample.errors import PersampleError as PersampleError
from persample.frozen_batch_norm import FrozenBatchNorm as FrozenBatchNorm
from persample.moments import Moments as Moments
from persample.moments import merge_moments as merge_moments
from persample.quantities import Gram as Gram
from persample.quantities import Mean as Mean
from persample.quantities import Norms as Norms
from persample.quantities import PerSample as PerSample
from persample.quantities import Projection as Projection
from persample.quantities import SecondMoment as SecondMoment
from persample.quantities import Variance as Variance
from persample.quantities import WeightedSum as WeightedSum
from persample.sources import PerSampleGradSource as PerSampleGradSource
from persample.sources import batched as batched
from persample.sources import make_source as make_source
from persample.sources import one_per_sample as one_per_sample
from persample.sources import register_backend as register_backend
from persample.sources import shared as shared
from persample.sources.registry import backends as backends
from persample.vogn import IVON as IVON
from persample.vogn import OGN as OGN
from persample.vogn import VOGN as VOGN
from persample.vogn import Ensemble as Ensemble
from persample.vogn import MeanFieldVI as MeanFieldVI
from persample.vogn import Posterior as Posterior
from persample.vogn import Prior as Prior
from persample.vogn import Vadam as Vadam

__version__ = "0.1.0"
