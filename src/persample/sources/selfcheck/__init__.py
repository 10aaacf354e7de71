"""The self-check: a backend's results against ordinary gradients and a loop over a few samples."""
