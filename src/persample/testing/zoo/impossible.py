"""Models that mix the samples, or rewrite themselves: every backend must refuse."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from persample.testing.zoo.case import Case, Net, reals, tokens


def _case(name: str, model: Any, inputs: Any) -> Case:
    return Case(name, model, inputs, impossible=True)


def _exchanged(model: Any, x: Tensor) -> Any:
    return model.inner(x) + model.inner(x.roll(1, 0))


def _contrast(model: Any, x: Tensor) -> Any:
    h = F.normalize(model.inner(x))
    return h @ h.mT


CASES = (
    _case("BatchNorm1d in training mode", lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), reals(4)),
    _case(
        "BatchNorm2d in training mode",
        lambda: nn.Sequential(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.ReLU()),
        reals(2, 4, 4),
    ),
    _case("BatchNorm3d in training mode", lambda: nn.BatchNorm3d(2), reals(2, 2, 3, 2)),
    _case(
        "BatchNorm without running statistics in eval mode",
        lambda: nn.BatchNorm1d(4, track_running_stats=False).eval(),
        reals(4),
    ),
    _case(
        "Functional batch norm in training mode",
        lambda: Net(lambda m, x: F.batch_norm(m.inner(x), None, None, training=True), inner=nn.Linear(4, 3)),
        reals(4),
    ),
    _case(
        "Batch norm written out",
        lambda: Net(lambda m, x: (lambda h: (h - h.mean(0)) / h.std(0))(m.inner(x)), inner=nn.Linear(4, 3)),
        reals(4),
    ),
    _case("Softmax over the batch", lambda: Net(lambda m, x: m.inner(x).softmax(0), inner=nn.Linear(4, 3)), reals(4)),
    _case(
        "Mean over the batch",
        lambda: Net(lambda m, x: m.inner(x) - m.inner(x).mean(0), inner=nn.Linear(4, 3)),
        reals(4),
    ),
    _case(
        "Division by the size of the batch",
        lambda: Net(lambda m, x: m.inner(x) / len(x), inner=nn.Linear(4, 3)),
        reals(4),
    ),
    _case("Each sample meets the next one", lambda: Net(_exchanged, inner=nn.Linear(4, 3)), reals(4)),
    _case(
        "Similarities by F.linear",
        lambda: Net(lambda m, x: F.linear(m.inner(x), m.inner(x)).logsumexp(1, keepdim=True), inner=nn.Linear(4, 3)),
        reals(4),
    ),
    _case(
        "LayerNorm with the numbers of one sample as its scale",
        lambda: Net(lambda m, x: F.layer_norm(m.inner(x), (4,), x[0]), inner=nn.Linear(4, 4)),
        reals(4),
    ),
    _case("Contrastive similarities", lambda: Net(_contrast, inner=nn.Linear(4, 3)), reals(4)),
    _case(
        "Attention whose sequence is the batch",
        lambda: Net(lambda m, x: m.attention(x, x, x)[0], attention=nn.MultiheadAttention(4, 2)),
        reals(5, 4),
    ),
    _case("RNN whose sequence is the batch", lambda: Net(lambda m, x: m.rnn(x)[0], rnn=nn.RNN(4, 3)), reals(5, 4)),
    _case("Embedding that rewrites its weight", lambda: nn.Embedding(6, 3, max_norm=0.5), tokens(4)),
    _case("Embedding that counts in the whole batch", lambda: nn.Embedding(6, 3, scale_grad_by_freq=True), tokens(4)),
)
