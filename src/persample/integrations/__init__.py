"""Integrations of trainers and other libraries: one module each, which imports that library.

`lightning`, `transformers` and `accelerate` let these trainers train a posterior: accumulated gradients, scaled losses,
checkpoints, and evaluation by averaged predictions. `laplace` gives laplace-torch its diagonals. `found` finds the
optimizer that a trainer has wrapped.
"""
