"""The models that the performance page is measured on: each gives a network, a batch of inputs and targets."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from persample.experiments.models import lenet5, mnist_convnet

Problem = tuple[nn.Module, Tensor, Tensor]


def _images(model: nn.Module, batch: int, *shape: int) -> Problem:
    return model, torch.randn(batch, *shape), torch.randint(0, 10, (batch,))


def mlp() -> nn.Module:
    """784-400-400-10."""
    layers = [nn.Linear(784, 400), nn.ReLU(), nn.Linear(400, 400), nn.ReLU(), nn.Linear(400, 10)]
    return nn.Sequential(nn.Flatten(), *layers)


def vgg_like() -> nn.Module:
    """Convolutions 3-32-64-pool-128-pool-128-pool, 3×3, padding 1, and a linear layer 2048-10."""

    def convolution(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU()]

    return nn.Sequential(
        *convolution(3, 32),
        *convolution(32, 64),
        nn.MaxPool2d(2),
        *convolution(64, 128),
        nn.MaxPool2d(2),
        *convolution(128, 128),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(2048, 10),
    )


class Block(nn.Module):
    """Two 3×3 convolutions with GroupNorm and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int, groups: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.GroupNorm(groups, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.GroupNorm(groups, outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.GroupNorm(groups, outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Return relu(F(x) + shortcut(x))."""
        h = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(h)) + self.shortcut(x))


def resnet(depths: tuple[int, ...], widths: tuple[int, ...], groups: int = 8) -> nn.Module:
    """A ResNet for images of 32×32 with GroupNorm."""
    layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 3, 1, 1, bias=False), nn.GroupNorm(groups, widths[0]), nn.ReLU()]
    inputs = widths[0]
    for stage, (depth, width) in enumerate(zip(depths, widths, strict=True)):
        for block in range(depth):
            layers.append(Block(inputs, width, 2 if stage > 0 and block == 0 else 1, groups))
            inputs = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10))


def mobile_net() -> nn.Module:
    """Depthwise 3×3 and pointwise 1×1 convolutions with GroupNorm, 32-64-128-128-256-256 channels, for 32×32 images."""

    def convolution(inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
        layer = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
        return [layer, nn.GroupNorm(8, outputs), nn.ReLU()]

    layers = convolution(3, 32, 3)
    for inputs, outputs, stride in ((32, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2), (256, 256, 1)):
        layers += convolution(inputs, inputs, 3, stride, groups=inputs) + convolution(inputs, outputs, 1)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 10))


class Transformer(nn.Module):
    """An encoder of 4 layers, width 128, 4 heads, feed-forward 512, with class token and learned positions.

    The head is a linear layer on the class token, or, if `tied`, predicts tokens with the embedding's weight.
    """

    def __init__(self, tied: bool, vocabulary: int = 256, length: int = 64, width: int = 128) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.position = nn.Parameter(torch.randn(1, length, width) * 0.02)
        self.class_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        layer = nn.TransformerEncoderLayer(width, 4, 512, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.head = None if tied else nn.Linear(width, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits of the class, `(B, 10)`, or of the tokens, `(B, V, T)`."""
        x = self.embedding(tokens) + self.position
        x = self.encoder(torch.cat([self.class_token.expand(len(x), -1, -1), x], 1))
        if self.head is not None:
            return self.head(x[:, 0])  # type: ignore[no-any-return]
        return F.linear(x[:, 1:], self.embedding.weight).transpose(1, 2)


def _transformer(tied: bool, batch: int) -> Problem:
    tokens = torch.randint(0, 256, (batch, 64))
    return Transformer(tied), tokens, tokens.roll(-1, 1) if tied else torch.randint(0, 10, (batch,))


class Bottleneck(nn.Module):
    """A 1×1, a 3×3 and a 1×1 convolution with GroupNorm and a shortcut, as in ResNet-50."""

    def __init__(self, inputs: int, width: int, stride: int, groups: int = 32) -> None:
        super().__init__()
        outputs = 4 * width
        self.layers = nn.Sequential(
            *(nn.Conv2d(inputs, width, 1, bias=False), nn.GroupNorm(groups, width), nn.ReLU()),
            *(nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.GroupNorm(groups, width), nn.ReLU()),
            *(nn.Conv2d(width, outputs, 1, bias=False), nn.GroupNorm(groups, outputs)),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.GroupNorm(groups, outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Return relu(F(x) + shortcut(x))."""
        return F.relu(self.layers(x) + self.shortcut(x))


def resnet50(classes: int = 1000) -> nn.Module:
    """ResNet-50 with GroupNorm of 32 groups, for images of 224×224 or smaller."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.GroupNorm(32, 64), nn.ReLU()]
    layers.append(nn.MaxPool2d(3, 2, 1))
    inputs = 64
    for stage, depth in enumerate((3, 4, 6, 3)):
        width = 64 * 2**stage
        for block in range(depth):
            layers.append(Bottleneck(inputs, width, 2 if stage > 0 and block == 0 else 1))
            inputs = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


class ViT(nn.Module):
    """ViT-S/16 for images of 224×224: 12 layers, width 384, 6 heads, class token."""

    def __init__(self, width: int = 384, heads: int = 6, depth: int = 12, classes: int = 1000) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 16, 16)
        self.class_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.position = nn.Parameter(torch.randn(1, 197, width) * 0.02)
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, `(B, classes)`."""
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], 1) + self.position
        return self.head(self.norm(self.encoder(x))[:, 0])  # type: ignore[no-any-return]


class GPTBlock(nn.Module):
    """Causal attention and a feed-forward network, normalised before each."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return x with what attention and the feed-forward network add."""
        size, length, width = x.shape
        split = self.qkv(self.norm1(x)).view(size, length, 3, self.heads, width // self.heads)
        q, k, v = split.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(size, length, width))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class GPT(nn.Module):
    """GPT-2 small: 12 layers, width 768, 12 heads, 50,257 tokens, the head tied to the embedding."""

    def __init__(self, vocabulary: int = 50257, length: int = 256, width: int = 768, depth: int = 12) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.normal_(self.position.weight, std=0.02)
        self.blocks = nn.Sequential(*(GPTBlock(width, width // 64) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits, `(B, V, T)`."""
        x = self.embedding(tokens) + self.position(torch.arange(tokens.shape[1], device=tokens.device))
        return F.linear(self.norm(self.blocks(x)), self.embedding.weight).transpose(1, 2)


def _gpt(batch: int) -> Problem:
    tokens = torch.randint(0, 50257, (batch, 256))
    return GPT(), tokens, tokens.roll(-1, 1)


#: Each entry makes a problem of the given batch size.
PROBLEMS: dict[str, Callable[[int], Problem]] = {
    "MNIST ConvNet": lambda batch: _images(mnist_convnet(), batch, 1, 28, 28),
    "LeNet-5": lambda batch: _images(lenet5(), batch, 3, 32, 32),
    "MLP": lambda batch: _images(mlp(), batch, 784),
    "VGG-like": lambda batch: _images(vgg_like(), batch, 3, 32, 32),
    "ResNet-20": lambda batch: _images(resnet((3, 3, 3), (16, 32, 64)), batch, 3, 32, 32),
    "mobile net": lambda batch: _images(mobile_net(), batch, 3, 32, 32),
    "ResNet-18": lambda batch: _images(resnet((2, 2, 2, 2), (64, 128, 256, 512)), batch, 3, 32, 32),
    "Transformer": lambda batch: _transformer(False, batch),
    "Transformer, tied head": lambda batch: _transformer(True, batch),
}

#: Those that only a GPU runs in a sensible time.
LARGE_PROBLEMS: dict[str, Callable[[int], Problem]] = {
    "ResNet-50": lambda batch: _images(resnet50(), batch, 3, 224, 224),
    "ViT-S": lambda batch: _images(ViT(), batch, 3, 224, 224),
    "GPT-2 small": _gpt,
}
