"""Trainers and libraries of others, each in a module of its own, which imports its package when it is imported itself.

`lightning`, `transformers` and `accelerate` let these trainers train a posterior: accumulated gradients, scaled losses,
checkpoints, and evaluation by averaged predictions. `laplace` gives laplace-torch its diagonals. `found` finds the
optimizer that a trainer has wrapped.
"""
