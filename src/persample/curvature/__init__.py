"""Curvature of a trained network from per-sample gradients: Fisher information, Laplace, EWC."""

from persample.curvature.fisher import fisher as fisher
from persample.curvature.information import Fisher as Fisher
from persample.curvature.laplace import laplace as laplace
from persample.curvature.penalty import ewc_penalty as ewc_penalty
