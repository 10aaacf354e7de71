"""VOGN: natural-gradient variational inference for neural networks, as a PyTorch optimizer, and its posterior."""

from persample.vogn.checks import DangerousFirstStepWarning as DangerousFirstStepWarning
from persample.vogn.checks import NonFiniteError as NonFiniteError
from persample.vogn.checks import SkippedStepWarning as SkippedStepWarning
from persample.vogn.elbo import Elbo as Elbo
from persample.vogn.optimizer import VOGN as VOGN
from persample.vogn.posterior import Posterior as Posterior
from persample.vogn.prediction import ClassPrediction as ClassPrediction
from persample.vogn.prediction import GaussianPrediction as GaussianPrediction
from persample.vogn.prior import Prior as Prior
