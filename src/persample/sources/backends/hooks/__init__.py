"""Backend `"hooks"`: the paper's method, written by hand (forward hook, tensor hook, unfold).

`source` runs forward and backward once; `rules` is the table from layers to rules; each rule is a function of the
layer, its input and the gradient at its output, in the file named after the layer. `counting` knows how often a
parameter is used, `sums` adds the contributions up, `printed` is the paper's approximation, `recorder` watches the
user's own passes.
"""

from persample.sources.backends.hooks.source import HooksSource as HooksSource
