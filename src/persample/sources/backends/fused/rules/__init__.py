"""Rules: how the contribution to the per-sample gradients of its parameters follows, for one operation each."""
