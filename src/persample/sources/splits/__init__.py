"""Splitting parts of a batch that are not tensors with the sample in dim 0."""
