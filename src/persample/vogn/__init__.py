"""VOGN: natural-gradient variational inference for neural networks, as a PyTorch optimizer."""

from persample.vogn.checks import DangerousFirstStepWarning as DangerousFirstStepWarning
from persample.vogn.checks import NonFiniteError as NonFiniteError
from persample.vogn.checks import SkippedStepWarning as SkippedStepWarning
from persample.vogn.optimizer import VOGN as VOGN
