"""Kernels in Triton for CUDA tensors; nothing here is imported before `serves` says that it can be used.

`products` are the kernels, `launch` calls them, `tuning` finds how, `cache` remembers that on disk.
"""
