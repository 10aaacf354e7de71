"""Curvature of a trained network from per-sample gradients: Fisher information, Laplace, EWC.

`fisher` computes the diagonal over a loader, `information` is the result as a value (merge, save, load), `laplace`
turns it into a posterior, `penalty` into the penalty of elastic weight consolidation. `of_outputs` finds the
distribution that a loss stands for.
"""

from persample.curvature.fisher import fisher as fisher
from persample.curvature.information import Fisher as Fisher
from persample.curvature.laplace import laplace as laplace
from persample.curvature.penalty import ewc_penalty as ewc_penalty
