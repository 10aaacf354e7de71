"""Backends: one file or folder each.

- `fused` (folder): operations captured by a `TorchFunctionMode`, all in one backward pass; the default.
- `hooks` (folder): the paper's method, a forward hook and a rule for each layer.
- `vmap`, `vjp`, `loop`: autograd gives the gradients of single samples; no rules. `loop` is the oracle.
- `external` (folder): BackPACK and Opacus, by their own machinery or by their rules for single layers.

`contributions` is what the rules of `fused` and `hooks` return: the gradients of the samples from one use of a
parameter, as factors, with their sums and the sums of their squares.
"""
