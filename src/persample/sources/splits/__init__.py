"""How the parts of a batch are split into samples, where they are no tensors whose dim 0 is the sample."""
