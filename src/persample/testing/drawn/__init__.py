"""Problems drawn by chance, as hypothesis strategies."""

from persample.testing.drawn.graphs import problems as problems
