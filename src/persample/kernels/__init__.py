"""Operators of PyTorch, `torch.ops.persample.NAME`, each worth a pass over memory of its own: products and the step.

`linear`, `convolution`, `outer`, `lookups` and `terms` have the sums Σ_i g_i and Σ_i g_i² of the gradients of one use
of a parameter, and the squared norms ‖g_i‖² where these take more than an operation or two. `convolution_forms` has the
ways to compute those of a convolution, `images` what goes through one. `pooling` is here because its fastest form is
found by trial, too: `autotune`. `step` draws weights. `library` makes the operators known.

Each operator has a form in PyTorch's own operations. On CPUs a kernel in C++ (`csrc/`) takes its place where one was
compiled (`compiled`) and takes these tensors: `products` calls that of convolutions and linear layers.
"""

from persample.kernels import products as products
