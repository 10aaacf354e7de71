"""What is wanted of the gradients of single samples, whatever backend computes them.

A quantity is an object with a name and one method, `begin(setting)`, which returns what reads the gradients, block by
block (see `protocol`). A block stands for the gradients of some samples by one parameter; it forms them, or a product
or norm of them, only where a quantity asks for it (see `block`).
"""

from persample.quantities.block import Block as Block
from persample.quantities.computed import Quantities as Quantities
from persample.quantities.gram import Gram as Gram
from persample.quantities.mean import Mean as Mean
from persample.quantities.norms import Norms as Norms
from persample.quantities.per_sample import PerSample as PerSample
from persample.quantities.projection import Projection as Projection
from persample.quantities.protocol import Accumulation as Accumulation
from persample.quantities.protocol import Quantity as Quantity
from persample.quantities.protocol import Setting as Setting
from persample.quantities.second_moment import SecondMoment as SecondMoment
from persample.quantities.variance import Variance as Variance
from persample.quantities.weighted_sum import Weighted as Weighted
from persample.quantities.weighted_sum import WeightedSum as WeightedSum
from persample.quantities.weighted_sum import clipping as clipping
