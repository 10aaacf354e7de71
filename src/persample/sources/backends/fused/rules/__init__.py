"""Rules: for each operation, the contribution of its parameters to the per-sample gradients."""
