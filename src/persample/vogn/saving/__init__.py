"""Saving and loading optimizers and posteriors.

`checkpoint` reads and writes an optimizer's state: `parameter_matching` finds its parameters, `state_schema` checks
each entry, `noise` and `observations` are what waits for the next step. `posterior_file` is a posterior in a file.
"""
