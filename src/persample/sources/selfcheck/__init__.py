"""The self-check: a backend's results against ordinary gradients and a loop over a few samples.

`computed` runs a backend, and the check if one is due. `verify` compares moments and per-sample gradients,
`verify_quantities` everything else, both with the `oracle`, within `tolerances`. `rounding` and `perturbation` tell
errors from rounding. `returned` checks the types and shapes of results, `raw_errors` explains errors inside backends,
and `rounds` lets quantities read the gradients, whose own errors `quantity_code` tells apart.
"""
