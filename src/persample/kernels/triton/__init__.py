"""Kernels in Triton for tensors on a GPU; `persample.kernels.gpu` imports them when they can be used.

`products` are kernels, `launch` calls them, `tuning` finds how, and remembers it. `step` are those of the optimizer,
`launch_step` calls them, `trial` tries whether they give the right numbers.
"""
