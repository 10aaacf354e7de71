"""Embedding: y_l = E[v_l], so row v of g_i is the sum of δ over the positions of sample i that hold v."""

from __future__ import annotations

from torch import Tensor, nn

from persample.sources.backends.contributions import Contribution, Lookups


def embedding(module: nn.Embedding, indices: Tensor, delta: Tensor) -> dict[str, Contribution]:
    """Return the contributions of one call; `indices` is `(B, …)` and `delta` is `(B, …, D)`."""
    samples = len(indices)
    indices = indices.reshape(samples, -1).long()
    delta = delta.reshape(samples, -1, module.embedding_dim)
    if module.padding_idx is not None:
        # The row of the padding index gets no gradient.
        delta = delta * (indices != module.padding_idx).unsqueeze(-1)
    return {"weight": Lookups(indices, delta, module.num_embeddings)}
