"""Backend `"fused"`: the project's own engine.

`capture` sends each operation on a parameter to its rule (`rule_table`, `rules`), and lets `carry` and `propagation`
follow the samples through all others. `trace` is what rules see of it, `taps` takes the gradients from the backward
pass, `accumulators` adds the contributions up. `layout`, `axis` and `owners` say where the samples are in a tensor,
`expressions` what is made of parameters alone. `linear` and `convolution` hold what these layers contribute, with the
products of `persample.kernels`. `replay` records steps and runs them again. `recorder` watches the user's own passes,
`usage_recorder` tells `persample.explain` what serves what.
"""

from persample.sources.backends.fused.source import FusedSource as FusedSource
