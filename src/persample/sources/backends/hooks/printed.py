"""The curvature as printed in the paper, ([[A]])² × G²: the terms of a gradient are squared before they are summed.

It drops the cross terms of the positions of a sample, and so is often several times too small.
"""

from __future__ import annotations

from torch import Tensor

from persample.kernels.lookups import add_up
from persample.kernels.outer import product
from persample.sources.backends.contributions import Contribution, Lookups, OuterProducts, Terms


def printed_second_moment(contribution: Contribution) -> Tensor:
    """Return Σ_i Σ_l (term l of g_i)², for the contributions that the rules for layers give."""
    match contribution:
        case OuterProducts(delta, a):
            return product(delta.square(), a.square()).view(contribution.shape)
        case Terms(terms):
            return terms.square().sum((0, 1))
        case Lookups(indices, delta, count):
            return add_up(indices, delta.square(), count)
    raise TypeError(f"The printed formula is not defined for {type(contribution).__name__}.")
