"""Rules: for each operation, the contribution of its parameters to the per-sample gradients.

One file per kind of operation: `linear`, `convolution`, `embedding`, `normalization`, `recurrent`, `grouped_mm`,
`pooling`. `decompositions` rewrites operations as others, `expanded` and `parts` combine parameters with samples,
`in_place`, `constants`, `reorder` and `channel_groups` handle special layouts, `nondifferentiable` those without a
gradient, and `fallback` everything else. The table is `persample.sources.backends.fused.rule_table`.
"""
