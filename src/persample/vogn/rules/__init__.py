"""The update rules, one per file: from observed gradients to the new posterior.

Each subclasses `VariationalOptimizer` with `_new_state`, `_part_precision` and `_update`; the formulas are the pure
functions of `persample.vogn.core`.
"""
