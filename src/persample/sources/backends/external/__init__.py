"""Backends that run the rules or the machinery of other packages.

`backpack` and `opacus` are the backends. Each runs the package's machinery (`backpack_extend`, `opacus_module`, on
`machinery`) on a copy of the model (`stand_in`), or only its rules for layers (`backpack_layers`, `opacus_layers`, on
`layer_rules`). `source` chooses between the two.
"""
