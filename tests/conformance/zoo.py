"""Named models: every layer that the documentation lists with each of its options, and the ways that break backends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from .case import Case
from .loss_kinds import robust
from .modules import (
    BareScale,
    ByMethod,
    FirstOutput,
    Folded,
    InTurn,
    Residual,
    ScaledLinear,
    SelfAttention,
    SideBySide,
    TiedToEmbedding,
    TimeFirst,
)


@dataclass(frozen=True)
class Entry:
    """A model and the inputs that it takes.

    Attributes:
        features: see `backend_promises`.
        build: makes the model.
        inputs: makes the inputs of a batch of the given size.
    """

    features: frozenset[str]
    build: Callable[[], nn.Module]
    inputs: Callable[[int], Any]

    def case(self, size: int) -> Case:
        with torch.random.fork_rng():
            torch.manual_seed(size)
            model = self.build().double()
            for parameter in model.parameters():
                parameter.data += 0.3 * torch.randn_like(parameter)
            inputs = self.inputs(size)
            with torch.no_grad():
                outputs = _applied(model, inputs)
            targets = torch.randn(outputs.shape).double()
        return Case(model, inputs, targets, robust, self.features)


def _applied(model: nn.Module, inputs: Any) -> Tensor:
    output: Tensor = (
        model(**inputs) if isinstance(inputs, dict) else model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    )
    return output


ZOO: dict[str, Entry] = {}


def _add(name: str, features: str, build: Callable[[], nn.Module], inputs: Callable[[int], Any]) -> None:
    ZOO[name] = Entry(frozenset(features.split(", ")), build, inputs)


def reals(*shape: int) -> Callable[[int], Tensor]:
    return lambda size: torch.randn(size, *shape).double()


def tokens(*shape: int, vocabulary: int = 6) -> Callable[[int], Tensor]:
    return lambda size: torch.randint(vocabulary, (size, *shape))


# Linear layers.

_add("Linear", "linear", lambda: nn.Linear(4, 3), reals(4))
_add("Linear without bias", "linear, no bias", lambda: nn.Linear(4, 3, bias=False), reals(4))
_add("Linear on a sequence", "linear, leading dimensions", lambda: nn.Linear(4, 3), reals(5, 4))
_add("Linear on a grid", "linear, leading dimensions", lambda: nn.Linear(4, 3), reals(2, 3, 2, 4))
_add(
    "Linear on a sequence without bias",
    "linear, leading dimensions, no bias",
    lambda: nn.Linear(4, 3, bias=False),
    reals(5, 4),
)
_add(
    "MLP", "linear, activation", lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3), nn.GELU()), reals(4)
)
_add(
    "Linear on a transposed sequence",
    "linear, leading dimensions",
    lambda: nn.Linear(4, 3),
    lambda size: torch.randn(size, 4, 5).double().mT,
)
_add(
    "Linear on an expanded input",
    "linear, leading dimensions",
    lambda: nn.Linear(4, 3),
    lambda size: torch.randn(size, 1, 4).double().expand(size, 5, 4),
)

# Convolutions.

_OF_DIMENSION = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
_CONVOLUTION_OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "": ("", {}),
    " without bias": (", no bias", {"bias": False}),
    " with stride that leaves a rest": (", stride", {"stride": 2}),
    " with stride longer than the window": (", stride", {"stride": 4}),
    " with padding": ("", {"padding": 2}),
    " with padding 'same'": (", padding same", {"padding": "same"}),
    " with padding 'valid'": (", padding valid", {"padding": "valid"}),
    " with dilation": (", dilation", {"dilation": 2}),
    " with dilated padding 'same'": (", padding same, dilation", {"padding": "same", "dilation": 2}),
    " with groups": (", groups", {"groups": 2}),
    " depthwise": (", groups", {"groups": 4, "out_channels": 8}),
    " with reflected padding": (", padding mode", {"padding": 1, "padding_mode": "reflect"}),
    " with replicated padding": (", padding mode", {"padding": 2, "padding_mode": "replicate"}),
    " with circular padding": (", padding mode", {"padding": 1, "padding_mode": "circular"}),
    " with circular padding 'same'": (", padding mode, padding same", {"padding": "same", "padding_mode": "circular"}),
    " with everything": (
        ", stride, dilation, groups, padding mode, no bias",
        {"stride": 2, "padding": 2, "dilation": 2, "groups": 2, "padding_mode": "replicate", "bias": False},
    ),
}
_TRANSPOSED_OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "": ("", {}),
    " without bias": (", no bias", {"bias": False}),
    " with stride": (", stride", {"stride": 2}),
    " with padding": ("", {"padding": 1}),
    " with output padding": (", stride, output padding", {"stride": 3, "output_padding": 2}),
    " with dilation": (", dilation", {"dilation": 2}),
    " with groups": (", groups", {"groups": 2}),
    " with everything": (
        ", stride, dilation, groups, output padding, no bias",
        {"stride": 2, "padding": 2, "output_padding": 1, "dilation": 2, "groups": 2, "bias": False},
    ),
}


def _add_convolutions() -> None:
    for n in (1, 2, 3):
        three = ", 3d" if n == 3 else ""
        size = 5 if n == 3 else 7
        for label, (features, options) in _CONVOLUTION_OPTIONS.items():
            options = {"out_channels": 2, "kernel_size": 2 if "same" in label and n == 1 else 3} | options
            _add(
                f"Conv{n}d{label}",
                f"conv{three}{features}",
                lambda n=n, options=options: _OF_DIMENSION[n](4, **options),  # type: ignore[misc]
                reals(4, *[size] * n),
            )
        for label, (features, options) in _TRANSPOSED_OPTIONS.items():
            options = {"out_channels": 2, "kernel_size": 3} | options
            _add(
                f"ConvTranspose{n}d{label}",
                f"conv transpose{three}{features}",
                lambda n=n, options=options: _TRANSPOSED[n](4, **options),  # type: ignore[misc]
                reals(4, *[3] * n),
            )


_add_convolutions()
_add(
    "Conv2d with different numbers along each dimension",
    "conv, stride, dilation",
    lambda: nn.Conv2d(2, 3, (3, 2), stride=(1, 2), padding=(2, 0), dilation=(2, 1)),
    reals(2, 6, 5),
)
_add(
    "Conv2d on a channels-last image",
    "conv",
    lambda: nn.Conv2d(2, 3, 2),
    lambda size: torch.randn(size, 2, 4, 4).double().to(memory_format=torch.channels_last),
)
_add("Conv2d with a window of one", "conv", lambda: nn.Conv2d(2, 3, 1), reals(2, 4, 4))
_add("Conv2d with one output position", "conv", lambda: nn.Conv2d(2, 3, 4), reals(2, 4, 4))
_add(
    "LeNet",
    "conv, activation, pooling, flatten, linear",
    lambda: nn.Sequential(
        nn.Conv2d(1, 3, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(3, 4, 2),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(4, 3),
    ),
    reals(1, 8, 8),
)
_add(
    "Autoencoder",
    "conv, conv transpose, activation, stride, output padding",
    lambda: nn.Sequential(
        nn.Conv2d(1, 3, 3, stride=2), nn.ELU(), nn.ConvTranspose2d(3, 1, 3, stride=2, output_padding=1)
    ),
    reals(1, 6, 6),
)

# Embeddings.

_add("Embedding", "embedding", lambda: nn.Embedding(6, 3), tokens(4))
_add("Embedding of one index per sample", "embedding", lambda: nn.Embedding(6, 3), tokens())
_add("Embedding of a table of indices", "embedding", lambda: nn.Embedding(6, 3), tokens(2, 3))
_add("Embedding of repeated indices", "embedding", lambda: nn.Embedding(6, 3), tokens(7, vocabulary=2))
_add(
    "Embedding with a padding index",
    "embedding, padding index",
    lambda: nn.Embedding(6, 3, padding_idx=1),
    tokens(7, vocabulary=2),
)
_add("Embedding of int32 indices", "embedding", lambda: nn.Embedding(6, 3), lambda size: tokens(4)(size).int())
_add("Embedding with sparse gradients", "embedding, sparse", lambda: nn.Embedding(6, 3, sparse=True), tokens(4))
_add("EmbeddingBag", "embedding bag", lambda: nn.EmbeddingBag(6, 3, mode="sum"), tokens(4, vocabulary=3))
_add(
    "Embedding tied to the output through a functional call",
    "embedding, functional use",
    lambda: TiedToEmbedding(nn.Embedding(6, 3)),
    tokens(4),
)

# Normalisations.

_add("LayerNorm", "layer norm", lambda: nn.LayerNorm(4), reals(4))
_add("LayerNorm on a sequence", "layer norm", lambda: nn.LayerNorm(4), reals(5, 4))
_add("LayerNorm over two dimensions", "layer norm", lambda: nn.LayerNorm((5, 4)), reals(3, 5, 4))
_add("LayerNorm over all dimensions", "layer norm", lambda: nn.LayerNorm((3, 5)), reals(3, 5))
_add(
    "LayerNorm without shift",
    "layer norm, norm shift missing",
    lambda: nn.LayerNorm(4, bias=False),
    reals(5, 4),
)
_add(
    "LayerNorm without parameters",
    "layer norm, no affine, linear",
    lambda: nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4, elementwise_affine=False)),
    reals(4),
)
_add("GroupNorm", "group norm", lambda: nn.GroupNorm(2, 4), reals(4, 3, 3))
_add("GroupNorm of one group", "group norm", lambda: nn.GroupNorm(1, 4), reals(4, 5))
_add("GroupNorm of single channels", "group norm", lambda: nn.GroupNorm(4, 4), reals(4, 2, 2, 2))
_add("GroupNorm without positions", "group norm", lambda: nn.GroupNorm(2, 4), reals(4))
_add("RMSNorm", "rms norm", lambda: nn.RMSNorm(4, eps=1e-5), reals(5, 4))
_add("InstanceNorm2d", "instance norm", lambda: nn.InstanceNorm2d(3, affine=True), reals(3, 3, 3))


def batch_norm_net() -> nn.Module:
    norm = nn.BatchNorm2d(3)
    norm.running_mean = torch.randn(3)
    norm.running_var = torch.rand(3) + 0.5
    return nn.Sequential(nn.Conv2d(2, 3, 2), norm, nn.ReLU()).eval()


_add("BatchNorm2d in eval mode", "conv, batch norm in eval mode, activation", batch_norm_net, reals(2, 4, 4))

# Ways to use a layer.


def tied_pair() -> nn.Module:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    return nn.Sequential(first, nn.Tanh(), second)


def frozen_first_layer() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    model[0].requires_grad_(False)
    return model


def frozen_weight() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    model[2].weight.requires_grad_(False)
    return model


class LanguageModel(nn.Module):
    """Embedding in and linear layer out, with one table for both."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm, self.head = nn.Embedding(6, 4), nn.LayerNorm(4), nn.Linear(4, 6)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(self.norm(self.embedding(x)))
        return output


class TiedNorms(nn.Module):
    """Two norms of different kinds with the same scale, and a linear layer with their shift as its bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.linear = nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.linear.bias = self.first.bias

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.linear(self.second(torch.tanh(self.first(x))))
        return output


class KeywordCall(nn.Module):
    """Calls its layer with a keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.inner(input=x)
        return output


class DeadBranch(nn.Module):
    """Calls one layer three times; one result is thrown away, one is detached."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.inner(x + 1)
        output: Tensor = self.inner(x) * self.inner(x - 1).detach()
        return output


class Pieces(nn.Module):
    """Cuts the features, sends each piece through the same layer, and puts the results together."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.inner(piece) for piece in x.split(2, dim=-1)], dim=-1)


class Recurrence(nn.Module):
    """A recurrent net of linear layers: each is used once for each step."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 3), nn.Linear(3, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), 3)
        for t in range(x.shape[1]):
            h = torch.tanh(self.inner(x[:, t]) + self.outer(h))
        return h


def with_hooks_of_the_user() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    model[0].register_forward_hook(lambda module, args, output: 2 * output)
    model[2].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    return model


class OneBranch(nn.Module):
    """Has two branches and takes one."""

    def __init__(self) -> None:
        super().__init__()
        self.taken, self.unused = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.taken(x)
        return output


class TwoInputs(nn.Module):
    """Takes two tensors and a number."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 3), nn.Linear(2, 3)

    def forward(self, x: Tensor, y: Tensor, scale: float = 1.0) -> Tensor:
        output: Tensor = self.left(x) + scale * self.right(y).tanh()
        return output


class LowRank(nn.Module):
    """The weight of a linear map plus a product of two parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.linear.requires_grad_(False)
        self.up, self.down = nn.Parameter(torch.zeros(4, 2)), nn.Parameter(torch.zeros(2, 4))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.linear.weight + self.up @ self.down, self.linear.bias)


class ClassToken(nn.Module):
    """A learned vector before the sequence and one for each position, as in vision transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.positions = nn.Parameter(torch.zeros(1, 1, 4)), nn.Parameter(torch.zeros(1, 4, 4))
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.positions
        output: Tensor = self.linear(x)[:, 0]
        return output


class MaskedAttention(nn.Module):
    """Causal attention in which each sample also hides some positions of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        causal = torch.ones(3, 3, dtype=torch.bool).triu(1)
        output: Tensor = self.attention(x, x, x, key_padding_mask=hidden, attn_mask=causal, need_weights=False)[0]
        return output


class Checkpointed(nn.Module):
    """Computes its inside once more in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = checkpoint(self.inner, x, use_reentrant=False)
        return output


class InPlaceOnView(nn.Module):
    """Changes a part of a layer's output in place."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.inner(x)
        h[:, :2].mul_(3.0)
        return h


class ChangedInput(nn.Module):
    """Changes the input of a layer in place after the layer has read it (the layer saves it only for its weight)."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = x.clone()
        y: Tensor = self.inner(h)
        return y * y.detach().sign()


class SharedSubmodule(nn.Module):
    """One layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.second(torch.tanh(self.first(x)))
        return output


class HalfDetached(nn.Module):
    """Uses one layer twice, once without gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            constant = self.inner(x)
        output: Tensor = self.inner(x) * constant
        return output


_add(
    "Residual block",
    "residual, linear, activation",
    lambda: Residual(nn.Sequential(nn.Linear(4, 4), nn.Tanh())),
    reals(4),
)
_add(
    "Residual convolution",
    "residual, conv, group norm, activation, padding same",
    lambda: nn.Sequential(
        Residual(nn.Sequential(nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding="same"))), nn.ReLU()
    ),
    reals(4, 4, 4),
)
_add(
    "In-place activation behind a convolution",
    "conv, activation, in place",
    lambda: nn.Sequential(nn.Conv2d(2, 3, 2), nn.ReLU(inplace=True), nn.Conv2d(3, 2, 2), nn.ELU(inplace=True)),
    reals(2, 4, 4),
)
_add(
    "In-place activation behind a linear layer on a sequence",
    "linear, leading dimensions, activation, in place",
    lambda: nn.Sequential(nn.Linear(4, 3), nn.ReLU(inplace=True), nn.Linear(3, 3), nn.SiLU(inplace=True)),
    reals(5, 4),
)
_add(
    "In-place activation behind a flattened convolution",
    "conv, flatten, activation, in place",
    lambda: nn.Sequential(nn.Conv2d(2, 3, 2), nn.Flatten(), nn.ReLU(inplace=True)),
    reals(2, 3, 3),
)
_add(
    "In-place activation behind a convolution whose frozen weight leaves the bias",
    "conv, activation, in place, frozen",
    lambda: nn.Sequential(_without_weight_gradient(nn.Conv1d(2, 3, 2)), nn.ReLU(inplace=True)),
    reals(2, 4),
)
_add("In-place operation on a part", "linear, in place, functional in place", InPlaceOnView, reals(4))
_add("Sign of itself", "linear", ChangedInput, reals(4))
_add("Tied weights", "linear, activation, tied", tied_pair, reals(4))
_add("Tied weights on a sequence", "linear, activation, tied, leading dimensions", tied_pair, reals(5, 4))
_add("One module twice in turn", "linear, twice", lambda: InTurn(nn.Linear(4, 4)), reals(4))
_add(
    "One convolution twice in turn",
    "conv, twice, padding same",
    lambda: InTurn(nn.Conv2d(2, 2, 3, padding="same")),
    reals(2, 3, 3),
)
_add("One module in two branches", "linear, twice", lambda: SideBySide(nn.Linear(4, 3)), reals(4))
_add("One norm in two branches", "layer norm, twice", lambda: SideBySide(nn.LayerNorm(4)), reals(5, 4))
_add("One embedding in two branches", "embedding, twice, functional use", lambda: TwoLookups(), tokens(4))
_add("One module under two names", "linear, twice", SharedSubmodule, reals(4))
_add("One module twice, once without gradient", "linear, detached use", HalfDetached, reals(4))
_add(
    "Embedding tied to a linear layer",
    "embedding, layer norm, linear, leading dimensions, tied",
    LanguageModel,
    tokens(5),
)
_add("Tied scales and shifts of different layers", "layer norm, group norm, linear, tied", TiedNorms, reals(4))
_add("Layer called with a keyword", "linear", KeywordCall, reals(4))
_add("Results that are thrown away or detached", "linear, twice", DeadBranch, reals(4))
_add("One layer on every piece of the features", "linear, twice", Pieces, reals(6))
_add("One layer on every step", "linear, twice, activation", Recurrence, reals(4, 4))
_add("Hooks of the user that change inputs and outputs", "linear, activation", with_hooks_of_the_user, reals(4))
_add("Frozen layer", "linear, activation, frozen", frozen_first_layer, reals(4))
_add("Frozen weight, trained bias", "linear, activation, frozen", frozen_weight, reals(4))
_add("Unused layer", "linear, unused", OneBranch, reals(4))
_add("All frozen", "linear, frozen", lambda: nn.Linear(4, 3).requires_grad_(False), reals(4))
_add("No parameters", "activation", lambda: nn.Tanh(), reals(4))
_add("Tuple of inputs", "linear, several inputs", TwoInputs, lambda size: (reals(4)(size), reals(2)(size), 0.5))
_add(
    "Dict of inputs",
    "linear, several inputs",
    TwoInputs,
    lambda size: {"y": reals(2)(size), "x": reals(4)(size), "scale": 0.5},
)
_add(
    "Dropout in eval mode",
    "linear, dropout",
    lambda: nn.Sequential(nn.Linear(4, 5), nn.Dropout(), nn.Linear(5, 3)).eval(),
    reals(4),
)
_add(
    "Dropout in training mode",
    "linear, dropout, random numbers",
    lambda: nn.Sequential(nn.Linear(4, 5), nn.Dropout(), nn.Linear(5, 5), nn.Dropout(0.3), nn.Linear(5, 3)),
    reals(4),
)
_add(
    "Dropout of channels",
    "conv, dropout, random numbers",
    lambda: nn.Sequential(nn.Conv2d(2, 4, 2), nn.Dropout2d(), nn.Conv2d(4, 2, 2)),
    reals(2, 4, 4),
)

# Beyond the listed layers.


class TwoLookups(nn.Module):
    """One embedding looked up in two ways."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.embedding(x) * F.embedding(x.flip(1), self.embedding.weight)


def _without_weight_gradient(module: nn.Conv1d) -> nn.Module:
    module.weight.requires_grad_(False)
    return module


_add("Bare parameter", "linear, bare parameter", lambda: nn.Sequential(nn.Linear(4, 3), BareScale(3)), reals(4))
_add("Class token and positions", "bare parameter, linear, leading dimensions", ClassToken, reals(3, 4))
_add("Low-rank update", "bare parameter, functional use, frozen", LowRank, reals(4))
_add("Layer called by its method", "method of a module, linear", lambda: ByMethod(nn.Linear(4, 3)), reals(4))
_add("Subclass of a layer", "subclass, linear", lambda: ScaledLinear(4, 3), reals(4))
_add("Time-first layout", "time-first layout, linear", lambda: TimeFirst(nn.Linear(4, 3)), reals(5, 4))
_add(
    "Time-first layout with as many steps as samples",
    "time-first layout, linear",
    lambda: TimeFirst(nn.Linear(4, 3)),
    reals(3, 4),
)
_add("Folded layout", "folded layout, linear", lambda: Folded(nn.Linear(4, 3)), reals(5, 4))
_add("Folded layout with one position", "folded layout, linear", lambda: Folded(nn.Linear(4, 3)), reals(1, 4))
_add("PReLU", "prelu, linear", lambda: nn.Sequential(nn.Linear(4, 3), nn.PReLU(3)), reals(4))
_add("Bilinear", "bilinear", lambda: nn.Bilinear(4, 2, 3), lambda size: (reals(4)(size), reals(2)(size)))
_add("Weight norm", "parametrization", lambda: parametrizations.weight_norm(nn.Linear(4, 3)), reals(4))
_add("Self-attention", "attention", lambda: SelfAttention(nn.MultiheadAttention(4, 2, batch_first=True)), reals(3, 4))
_add(
    "Masked attention",
    "attention",
    MaskedAttention,
    lambda size: (reals(3, 4)(size), torch.tensor([[False, False, True]]).expand(size, 3)),
)
_add(
    "TransformerEncoderLayer",
    "attention",
    lambda: nn.TransformerEncoderLayer(4, 2, 5, dropout=0.0, batch_first=True),
    reals(3, 4),
)
_add(
    "TransformerEncoderLayer in eval mode",
    "attention",
    lambda: nn.TransformerEncoderLayer(4, 2, 5, batch_first=True).eval(),
    reals(3, 4),
)
for _kind in (nn.RNN, nn.GRU, nn.LSTM):
    _add(
        _kind.__name__,
        "recurrent",
        lambda kind=_kind: FirstOutput(kind(4, 3, batch_first=True)),  # type: ignore[misc]
        reals(5, 4),
    )
    _add(
        f"{_kind.__name__} of two layers in both directions",
        "recurrent",
        lambda kind=_kind: FirstOutput(kind(4, 3, num_layers=2, bidirectional=True, batch_first=True)),  # type: ignore[misc]
        reals(5, 4),
    )
_add("Activation checkpointing", "checkpoint, linear, activation", Checkpointed, reals(4))
