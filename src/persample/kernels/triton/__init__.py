"""Kernels in Triton for tensors on a GPU; `persample.kernels.gpu` imports them when they can be used.

`products` are the kernels, `launch` calls them, `tuning` finds how, and remembers it.
"""
