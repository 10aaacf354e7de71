"""Backends that run the rules or the machinery of other packages.

`backpack` and `opacus` are the backends. Each runs the package's machinery (`backpack_extend`, `opacus_module`, on
`machinery`) on a copy of the model (`stand_in`), or only its rules for layers (`backpack_layers`, `opacus_layers`, on
`layer_rules`). `source` chooses between the two. Quantities come from the rules: `layer_gradients` holds what they
read, `backpack_norms` and `opacus_norms` the packages' own norms.
"""
