"""Variational training of neural networks, as PyTorch optimizers: VOGN and its siblings, and their posterior.

`core` has the update as pure functions, `rules` one optimizer in each file. `optimizer` is their common base: it draws
weights (`sampling`, `lending`), collects moments there (`pending`, `observations`), and steps. `posterior_state` holds
groups and precision and saves them (`saving`). `posterior` is the result as a value, with predictions (`prediction`,
`monte_carlo`) and the evidence lower bound (`elbo`).
"""

from persample.sources.recording.reduction_warnings import LossReductionWarning as LossReductionWarning
from persample.vogn import presets as presets
from persample.vogn.changed_gradients import UnusedGradientWarning as UnusedGradientWarning
from persample.vogn.changed_parameters import UntrainedParameterWarning as UntrainedParameterWarning
from persample.vogn.diagnostics import Diagnostics as Diagnostics
from persample.vogn.diagnostics import LayerDiagnostics as LayerDiagnostics
from persample.vogn.diagnostics import PosteriorWidthWarning as PosteriorWidthWarning
from persample.vogn.diagnostics import StuckCurvatureWarning as StuckCurvatureWarning
from persample.vogn.distributed import SeparateProcessesWarning as SeparateProcessesWarning
from persample.vogn.elbo import Elbo as Elbo
from persample.vogn.ensemble import Ensemble as Ensemble
from persample.vogn.failures import DangerousFirstStepWarning as DangerousFirstStepWarning
from persample.vogn.failures import NonFiniteError as NonFiniteError
from persample.vogn.failures import SkippedStepWarning as SkippedStepWarning
from persample.vogn.loss import UntrainedLossWarning as UntrainedLossWarning
from persample.vogn.monte_carlo import DrawOptions as DrawOptions
from persample.vogn.monte_carlo import for_each_draw as for_each_draw
from persample.vogn.optimizer import VariationalOptimizer as VariationalOptimizer
from persample.vogn.posterior import Posterior as Posterior
from persample.vogn.prediction import ClassPrediction as ClassPrediction
from persample.vogn.prediction import GaussianPrediction as GaussianPrediction
from persample.vogn.prior import Prior as Prior
from persample.vogn.rules.ivon import IVON as IVON
from persample.vogn.rules.mean_field import MeanFieldVI as MeanFieldVI
from persample.vogn.rules.ogn import OGN as OGN
from persample.vogn.rules.vadam import Vadam as Vadam
from persample.vogn.rules.vogn import VOGN as VOGN
from persample.vogn.sampling import draw as draw
from persample.vogn.sampling import standard_noise as standard_noise
