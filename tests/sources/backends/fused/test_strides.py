"""Results lie in memory as those of PyTorch's ordinary operations: by that, random numbers fall on the same entries."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import persample

Order = Callable[[Tensor], Tensor]
Strides = list[tuple[int, ...]]


def as_made(x: Tensor) -> Tensor:
    return x


def reversed_dims(x: Tensor) -> Tensor:
    """All dimensions stand in memory the other way round."""
    return x.permute(*reversed(range(x.dim()))).contiguous().permute(*reversed(range(x.dim())))


def second_last(x: Tensor) -> Tensor:
    """Dim 1 is the last in memory, as in `channels_last`, or as after a transpose."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if x.dim() > 2 else x


def first_behind(x: Tensor) -> Tensor:
    """The samples are behind dim 1 in memory, as where the time comes first."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def every_other(x: Tensor) -> Tensor:
    """There are gaps in memory."""
    return x.repeat_interleave(2, -1)[..., ::2]


ORDERS: list[Order] = [as_made, reversed_dims, second_last, first_behind, every_other]


class Product(nn.Module):
    """A matrix, as an operand of `operation`."""

    def __init__(self, operation: Callable[[Tensor, Tensor], Tensor], *shape: int) -> None:
        super().__init__()
        self.operation, self.matrix = operation, nn.Parameter(torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.operation(x, self.matrix)


LAYERS: Mapping[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(5, 3), (4, 5)),
    "linear of frames": (lambda: nn.Linear(5, 3), (4, 6, 5)),
    "linear of frames without bias": (lambda: nn.Linear(5, 3, bias=False), (4, 6, 5)),
    "linear of images": (lambda: nn.Linear(5, 3), (4, 2, 6, 5)),
    "linear of images without bias": (lambda: nn.Linear(5, 3, bias=False), (4, 2, 6, 5)),
    "matmul": (lambda: Product(torch.matmul, 5, 3), (4, 5)),
    "matmul of frames": (lambda: Product(torch.matmul, 5, 3), (4, 6, 5)),
    "matmul of images": (lambda: Product(torch.matmul, 5, 3), (4, 2, 6, 5)),
    "matmul with a vector": (lambda: Product(torch.matmul, 5), (4, 6, 5)),
    "matmul in front": (lambda: Product(lambda x, m: m @ x, 3, 5), (4, 5, 6)),
    "matmul in front of images": (lambda: Product(lambda x, m: m @ x, 3, 5), (4, 2, 5, 6)),
    "batches of matrices": (lambda: Product(torch.matmul, 2, 5, 3), (4, 2, 6, 5)),
    "addmm": (lambda: Product(lambda x, m: torch.addmm(m[0], x, m), 5, 3), (4, 5)),
    "scale": (lambda: Product(torch.mul, 6, 1), (4, 2, 6, 5)),
    "scale in front": (lambda: Product(lambda x, m: m * x, 2, 1, 5), (4, 2, 6, 5)),
    "where": (lambda: Product(lambda x, m: torch.where(x > 0, x, m), 2, 6, 5), (4, 2, 6, 5)),
    "cat": (lambda: Product(lambda x, m: torch.cat([m.expand(len(x), -1, -1), x], 1), 1, 1, 5), (4, 6, 5)),
    "bilinear": (lambda: nn.Bilinear(5, 5, 3), (4, 6, 5)),
    "prelu": (lambda: nn.PReLU(2), (4, 2, 6, 5)),
    "masked_fill": (lambda: Product(lambda x, m: x.masked_fill(x > 0, m[0]), 1), (4, 2, 6, 5)),
    "conv1d": (lambda: nn.Conv1d(2, 4, 3, padding=1), (4, 2, 6)),
    "conv2d": (lambda: nn.Conv2d(2, 4, 3, padding=1), (4, 2, 6, 5)),
    "conv2d of one channel": (lambda: nn.Conv2d(1, 4, 3), (4, 1, 6, 5)),
    "pointwise conv2d": (lambda: nn.Conv2d(2, 4, 1), (4, 2, 6, 5)),
    "pointwise conv2d that jumps": (lambda: nn.Conv2d(2, 4, 1, stride=2), (4, 2, 6, 5)),
    "pointwise conv1d that jumps": (lambda: nn.Conv1d(2, 4, 1, stride=2), (4, 2, 6)),
    "pointwise conv3d that jumps": (lambda: nn.Conv3d(2, 4, 1, stride=2), (4, 2, 6, 5, 4)),
    "depthwise conv2d": (lambda: nn.Conv2d(2, 4, 3, groups=2), (4, 2, 6, 5)),
    "dilated conv2d": (lambda: nn.Conv2d(2, 4, 2, dilation=2, padding="same"), (4, 2, 6, 5)),
    "circular conv2d": (lambda: nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"), (4, 2, 6, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 4, 3, padding=1), (4, 2, 6, 5, 4)),
    "conv_transpose1d": (lambda: nn.ConvTranspose1d(2, 4, 3, stride=2), (4, 2, 6)),
    "conv_transpose2d": (lambda: nn.ConvTranspose2d(2, 4, 3, stride=2), (4, 2, 6, 5)),
    "conv_transpose3d": (lambda: nn.ConvTranspose3d(2, 4, 3, stride=2), (4, 2, 6, 5, 4)),
    "layer_norm": (lambda: nn.LayerNorm(5), (4, 6, 5)),
    "layer_norm of images": (lambda: nn.LayerNorm((6, 5)), (4, 2, 6, 5)),
    "rms_norm": (lambda: nn.RMSNorm(5), (4, 6, 5)),
    "rms_norm of images": (lambda: nn.RMSNorm((6, 5)), (4, 2, 6, 5)),
    "group_norm of rows": (lambda: nn.GroupNorm(3, 6), (4, 6)),
    "group_norm of frames": (lambda: nn.GroupNorm(3, 6), (4, 6, 5)),
    "group_norm": (lambda: nn.GroupNorm(2, 4), (4, 4, 6, 5)),
    "group_norm of one group": (lambda: nn.GroupNorm(1, 4), (4, 4, 6, 5)),
    "group_norm of volumes": (lambda: nn.GroupNorm(2, 4), (4, 4, 3, 5, 2)),
    "batch_norm of rows": (lambda: nn.BatchNorm1d(6).eval(), (4, 6)),
    "batch_norm of frames": (lambda: nn.BatchNorm1d(6).eval(), (4, 6, 5)),
    "batch_norm": (lambda: nn.BatchNorm2d(4).eval(), (4, 4, 6, 5)),
    "batch_norm of volumes": (lambda: nn.BatchNorm3d(4).eval(), (4, 4, 3, 5, 2)),
    "instance_norm of frames": (lambda: nn.InstanceNorm1d(6, affine=True), (4, 6, 5)),
    "instance_norm": (lambda: nn.InstanceNorm2d(4, affine=True), (4, 4, 6, 5)),
    "instance_norm of volumes": (lambda: nn.InstanceNorm3d(4, affine=True), (4, 4, 3, 5, 2)),
    "max_pool2d": (lambda: nn.MaxPool2d(2), (4, 4, 6, 6)),
    "rnn": (lambda: nn.RNN(5, 3, batch_first=True), (4, 6, 5)),
    "lstm": (lambda: nn.LSTM(5, 3, 2, batch_first=True), (4, 6, 5)),
    "gru both ways": (lambda: nn.GRU(5, 3, bidirectional=True, batch_first=True), (4, 6, 5)),
    "lstm with projections": (lambda: nn.LSTM(5, 3, proj_size=2, batch_first=True), (4, 6, 5)),
    "lstm cell": (lambda: nn.LSTMCell(5, 3), (4, 5)),
    "gru cell": (lambda: nn.GRUCell(5, 3), (4, 5)),
    "rnn cell": (lambda: nn.RNNCell(5, 3), (4, 5)),
    "attention": (lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True), (4, 6, 4)),
}


class Watched(nn.Module):
    """A layer on what a parameter scales, in the order of `order` in memory; the strides of its results are kept."""

    def __init__(self, layer: nn.Module, order: Order, needs_gradient: bool) -> None:
        super().__init__()
        self.layer, self.order, self.needs_gradient = layer, order, needs_gradient
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.found: Strides = []

    def forward(self, x: Tensor) -> Tensor:
        x = self.order(x)
        x = x * self.scale if self.needs_gradient else x
        results = self.layer(*[x] * (2 if isinstance(self.layer, nn.Bilinear) else 1))
        tensors = [t for t in torch.utils._pytree.tree_leaves(results) if isinstance(t, Tensor)]
        self.found = [_strides(t) for t in [x, *tensors]]
        result = tensors[0] * (1 + 0 * self.scale)
        return result.reshape(len(x), -1)


def _strides(t: Tensor) -> tuple[int, ...]:
    """The strides, but for those of dimensions of size 1, which say nothing."""
    return tuple(s if size > 1 else 0 for s, size in zip(t.stride(), t.shape, strict=True))


def loss_fn(outputs: Tensor, targets: Any) -> Tensor:
    return outputs.sin().sum(1)


@pytest.mark.parametrize("needs_gradient", [True, False], ids=["inner", "first"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("layer", LAYERS)
def test_results_lie_as_those_of_pytorch(layer: str, order: Order, needs_gradient: bool) -> None:
    torch.manual_seed(0)
    make, shape = LAYERS[layer]
    model, x = Watched(make(), order, needs_gradient), torch.randn(shape)
    model(x)
    expected = model.found
    persample.make_source("fused", model, loss_fn, check="never").moments(x, None)
    assert model.found == expected


@pytest.mark.parametrize("shape", [(4, 4, 6, 5), (4, 4, 1, 1), (4, 4, 1, 5)])
@pytest.mark.parametrize(
    "layer", ["group_norm", "pointwise conv2d that jumps", "conv2d", "batch_norm", "conv_transpose2d"]
)
def test_layers_in_channels_last(layer: str, shape: tuple[int, ...]) -> None:
    """The weights, too; and images of a single pixel or row, which lie both ways."""
    torch.manual_seed(0)
    make, (_, channels, *_) = LAYERS[layer]
    layers = nn.Sequential(nn.Conv2d(4, channels, 1), make()).to(memory_format=torch.channels_last)
    for order in ORDERS:
        model, x = Watched(layers, order, needs_gradient=False), torch.randn(shape)
        try:
            model(x)
        except RuntimeError:  # the image is too small
            return
        expected = model.found
        persample.make_source("fused", model, loss_fn, check="never").moments(x, None)
        assert model.found == expected


@pytest.mark.parametrize("folded", ["time first", "samples first"])
@pytest.mark.parametrize("layer", ["group_norm", "conv2d", "batch_norm", "instance_norm", "conv_transpose2d"])
def test_frames_lie_as_those_of_pytorch(layer: str, folded: str) -> None:
    torch.manual_seed(0)
    make, (_, channels, *_) = LAYERS[layer]

    def frames(x: Tensor) -> Tensor:
        x = x.transpose(0, 1) if folded == "time first" else x
        return second_last(x.flatten(0, 1))

    class Frames(Watched):
        def forward(self, x: Tensor) -> Tensor:
            x = frames(x)
            result = self.layer(x)
            self.found = [_strides(x), _strides(result)]
            result = result.unflatten(0, (3, 4) if folded == "time first" else (4, 3))
            return (result.transpose(0, 1) if folded == "time first" else result).flatten(1)

    model, x = Frames(make(), as_made, needs_gradient=False), torch.randn(4, 3, channels, 6, 5)
    del model.scale
    model(x)
    expected = model.found
    persample.make_source("fused", model, loss_fn, check="never").moments(x, None)
    assert model.found == expected


def test_dropout_behind_group_norm_falls_on_the_same_entries() -> None:
    """The first batch is checked against an ordinary backward pass with the same random numbers."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(64, 3)).to(
        memory_format=torch.channels_last
    )
    x = torch.randn(5, 2, 6, 6).to(memory_format=torch.channels_last)
    model(x)
    persample.make_source("fused", model, loss_fn, check="first").moments(x, None)


@pytest.mark.parametrize("padding_idx", [None, 0])
def test_embeddings_lie_as_those_of_pytorch(padding_idx: int | None) -> None:
    torch.manual_seed(0)
    model = Watched(nn.Embedding(7, 5, padding_idx), as_made, needs_gradient=False)
    for order in (as_made, reversed_dims, every_other):
        model.order = order
        tokens = torch.randint(7, (4, 6))
        model(tokens)
        expected = model.found
        persample.make_source("fused", model, loss_fn, check="never").moments(tokens, None)
        assert model.found == expected
