"""The models of timm as their authors wrote them, small and with random weights: fused is exact on all.

timm imports torchvision, which does not load beside every build of PyTorch. Where it cannot be imported these tests are
skipped; the same architectures are covered through transformers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

try:
    import timm
    from timm.layers import GroupNorm
    from timm.models.convnext import ConvNeXt
    from timm.models.resnet import BasicBlock, ResNet
    from timm.models.vision_transformer import VisionTransformer
except (ImportError, RuntimeError) as problem:
    # A torchvision that does not fit the build of PyTorch raises a RuntimeError.
    pytest.skip(f"timm cannot be imported ({problem})", allow_module_level=True)

import persample
from persample.errors import UnsupportedModelError

from .exactness import assert_exact

_BLOCKS: dict[str, Any] = {"layers": (1, 1, 1, 1), "channels": (8, 8, 8, 8), "num_classes": 3, "zero_init_last": False}

MODELS: dict[str, Callable[[], nn.Module]] = {
    "ResNet": lambda: ResNet(BasicBlock, **_BLOCKS),
    "ResNet with GroupNorm": lambda: ResNet(BasicBlock, norm_layer=partial(GroupNorm, num_groups=4), **_BLOCKS),
    "ViT": lambda: VisionTransformer(img_size=32, patch_size=16, embed_dim=8, depth=2, num_heads=2, num_classes=3),
    "ConvNeXt": lambda: ConvNeXt(depths=(1, 1, 1, 1), dims=(4, 8, 8, 8), num_classes=3),
}
#: Shipped by name, with all their options: the largest that is still tested in seconds.
BY_NAME = ("resnet10t",)


def loss_fn(outputs: Tensor, targets: Any = None) -> Tensor:
    return (outputs.sin() * torch.linspace(-1, 1, outputs.shape[1], dtype=outputs.dtype)).sum(1)


def made(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = MODELS[name]() if name in MODELS else timm.create_model(name, pretrained=False, num_classes=3)
    for parameter in model.double().parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model, torch.randn(3, 3, 32, 32).double()


@pytest.mark.parametrize("name", [*MODELS, *BY_NAME])
def test_fused_is_exact_in_eval_mode(name: str, per_sample_truth: Any, no_trace: Any) -> None:
    model, inputs = made(name)
    model.eval()
    truth = per_sample_truth(model, loss_fn, inputs, None)
    assert_exact("fused", model, loss_fn, inputs, truth, no_trace)


@pytest.mark.parametrize("name", ["ResNet with GroupNorm", "ViT", "ConvNeXt"])
def test_fused_is_exact_in_training_mode(name: str, per_sample_truth: Any, no_trace: Any) -> None:
    model, inputs = made(name)
    truth = per_sample_truth(model, loss_fn, inputs, None, stream="batch")
    assert_exact("fused", model, loss_fn, inputs, truth, no_trace)


def test_batch_norm_in_training_mode_is_refused(backend: str) -> None:
    model, inputs = made("ResNet")
    with pytest.raises(UnsupportedModelError, match="in training mode"):
        persample.make_source(backend, model, loss_fn).moments(inputs, None)


@pytest.mark.parametrize("name", MODELS)
def test_other_backends_are_exact_or_refuse(backend: str, name: str, per_sample_truth: Any, no_trace: Any) -> None:
    model, inputs = made(name)
    model.eval()
    truth = per_sample_truth(model, loss_fn, inputs, None)
    with contextlib.nullcontext() if backend in ("loop", "fused") else contextlib.suppress(UnsupportedModelError):
        assert_exact(backend, model, loss_fn, inputs, truth, no_trace, check="first")
