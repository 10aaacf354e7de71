"""The products of single samples, each an operator of PyTorch, `torch.ops.persample.NAME`.

`linear`, `convolution`, `outer`, `lookups` and `terms` have the sums Σ_i g_i and Σ_i g_i² of the gradients of one use
of a parameter, and the squared norms ‖g_i‖² where these take more than an operation or two. `pooling` is here because
its fastest form is found by trial, too: `autotune`. `library` makes the operators known.
"""
