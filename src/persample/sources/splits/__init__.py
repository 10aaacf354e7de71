"""Splitting parts of a batch that are not tensors with the sample in dim 0.

`wrappers` has what users declare (`shared`, `batched`, `one_per_sample`), `detection` finds lists, packed sequences and
objects by itself, `parts` splits each kind, `objects` reads dataclasses and mappings, and `tree` walks nested
arguments.
"""
