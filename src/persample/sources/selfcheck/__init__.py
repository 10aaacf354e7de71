"""The self-check: what a backend claims against ordinary gradients and a loop over a few samples."""
