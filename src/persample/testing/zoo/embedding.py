"""Embeddings."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from persample.testing.zoo.case import Case, Net, both, reals, tie, tokens

CASES = (
    Case("Embedding", lambda: nn.Embedding(6, 3), tokens(4)),
    Case("Embedding of one index per sample", lambda: nn.Embedding(6, 3), tokens()),
    Case("Embedding of a table of indices", lambda: nn.Embedding(6, 3), tokens(2, 3)),
    Case("Embedding of repeated indices", lambda: nn.Embedding(6, 3), tokens(7, vocabulary=2)),
    Case("Embedding with a padding index", lambda: nn.Embedding(6, 3, padding_idx=1), tokens(7, vocabulary=2)),
    Case(
        "Embedding with a negative padding index", lambda: nn.Embedding(6, 3, padding_idx=-5), tokens(7, vocabulary=2)
    ),
    Case("Embedding of int32 indices", lambda: nn.Embedding(6, 3), lambda size: tokens(4)(size).int()),
    Case("Embedding with sparse gradients", lambda: nn.Embedding(6, 3, sparse=True), tokens(4)),
    Case("EmbeddingBag of sums", lambda: nn.EmbeddingBag(6, 3, mode="sum"), tokens(4, vocabulary=3)),
    Case("EmbeddingBag of means", lambda: nn.EmbeddingBag(6, 3), tokens(4, vocabulary=3)),
    Case("EmbeddingBag of maxima", lambda: nn.EmbeddingBag(6, 3, mode="max"), tokens(4, vocabulary=3)),
    Case("EmbeddingBag with a padding index", lambda: nn.EmbeddingBag(6, 3, padding_idx=1), tokens(4, vocabulary=3)),
    Case(
        "EmbeddingBag with weights",
        lambda: Net(lambda m, i, w: m.bag(i, per_sample_weights=w), bag=nn.EmbeddingBag(6, 3, mode="sum")),
        both(tokens(4, vocabulary=3), reals(4)),
    ),
    Case(
        "Embedding tied to the output through a functional call",
        lambda: Net(lambda m, x: F.linear(torch.tanh(m.table(x)), m.table.weight), table=nn.Embedding(6, 3)),
        tokens(4),
    ),
    Case(
        "Embedding tied to a linear layer",
        lambda: tie(nn.Sequential(nn.Embedding(6, 4), nn.LayerNorm(4), nn.Linear(4, 6)), **{"2.weight": "0.weight"}),
        tokens(5),
    ),
    Case(
        "One embedding looked up in two ways",
        lambda: Net(lambda m, x: m.table(x) * F.embedding(x.flip(1), m.table.weight), table=nn.Embedding(6, 3)),
        tokens(4),
    ),
    Case(
        "Rows of a table by index",
        lambda: Net(lambda m, x: m.table.weight[x].sin(), table=nn.Embedding(6, 3)),
        tokens(4),
    ),
    Case(
        "One-hot vectors times a table",
        lambda: Net(lambda m, x: F.one_hot(x, 6).double() @ m.table.weight, table=nn.Embedding(6, 3)),
        tokens(4),
    ),
    Case(
        "Tokens and positions",
        lambda: Net(
            lambda m, x: m.token(x) + m.position(torch.arange(x.shape[1])),
            token=nn.Embedding(6, 3),
            position=nn.Embedding(5, 3),
        ),
        tokens(4),
    ),
)
