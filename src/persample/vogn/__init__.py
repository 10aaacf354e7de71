"""VOGN: natural-gradient variational inference for neural networks, as a PyTorch optimizer."""

from persample.vogn.checks import DangerousFirstStepWarning, NonFiniteError
from persample.vogn.optimizer import VOGN

__all__ = ["VOGN", "DangerousFirstStepWarning", "NonFiniteError"]
