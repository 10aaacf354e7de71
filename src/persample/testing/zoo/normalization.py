"""Normalisations that keep the samples apart."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from persample.testing.zoo.case import Case, Net, parameter, reals


def with_statistics(norm: nn.Module) -> nn.Module:
    """Return `norm` in eval mode, with other statistics than zeros and ones."""
    norm.get_buffer("running_mean").normal_()
    norm.get_buffer("running_var").uniform_(0.5, 2)
    return norm.eval()


def _layer_norm_without_rule(model: Any, x: Tensor) -> Any:
    """Written out, as in many models of others."""
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return scaled * model.scale + model.shift


CASES = (
    Case("LayerNorm", lambda: nn.LayerNorm(4), reals(4)),
    Case("LayerNorm on a sequence", lambda: nn.LayerNorm(4), reals(5, 4)),
    Case("LayerNorm over two dimensions", lambda: nn.LayerNorm((5, 4)), reals(3, 5, 4)),
    Case("LayerNorm over all dimensions", lambda: nn.LayerNorm((3, 5)), reals(3, 5)),
    Case("LayerNorm without shift", lambda: nn.LayerNorm(4, bias=False), reals(5, 4)),
    Case(
        "LayerNorm without parameters",
        lambda: nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4, elementwise_affine=False)),
        reals(4),
    ),
    Case(
        "LayerNorm written out",
        lambda: Net(_layer_norm_without_rule, scale=parameter(4), shift=parameter(4)),
        reals(5, 4),
    ),
    Case("RMSNorm", lambda: nn.RMSNorm(4, eps=1e-5), reals(5, 4)),
    Case("RMSNorm over two dimensions", lambda: nn.RMSNorm((5, 4)), reals(2, 5, 4)),
    Case(
        "RMSNorm with a scale of one plus a parameter",
        lambda: Net(lambda m, x: F.rms_norm(x, (4,)) * (1 + m.scale), scale=parameter(4)),
        reals(5, 4),
    ),
    Case("GroupNorm", lambda: nn.GroupNorm(2, 4), reals(4, 3, 3)),
    Case("GroupNorm of one group", lambda: nn.GroupNorm(1, 4), reals(4, 5)),
    Case("GroupNorm of single channels", lambda: nn.GroupNorm(4, 4), reals(4, 2, 2, 2)),
    Case("GroupNorm without positions", lambda: nn.GroupNorm(2, 4), reals(4)),
    Case("InstanceNorm1d", lambda: nn.InstanceNorm1d(3, affine=True), reals(3, 4)),
    Case("InstanceNorm2d", lambda: nn.InstanceNorm2d(3, affine=True), reals(3, 3, 3)),
    Case("InstanceNorm3d", lambda: nn.InstanceNorm3d(3, affine=True), reals(3, 2, 2, 2)),
    Case(
        "InstanceNorm2d with running statistics in training mode",
        lambda: nn.InstanceNorm2d(3, affine=True, track_running_stats=True),
        reals(3, 3, 3),
    ),
    Case(
        "InstanceNorm2d with running statistics in eval mode",
        lambda: with_statistics(nn.InstanceNorm2d(3, affine=True, track_running_stats=True)),
        reals(3, 3, 3),
    ),
    Case("BatchNorm1d in eval mode", lambda: with_statistics(nn.BatchNorm1d(4)), reals(4)),
    Case("BatchNorm1d on a sequence in eval mode", lambda: with_statistics(nn.BatchNorm1d(4)), reals(4, 3)),
    Case(
        "BatchNorm2d in eval mode",
        lambda: nn.Sequential(nn.Conv2d(2, 3, 2), with_statistics(nn.BatchNorm2d(3)), nn.ReLU()),
        reals(2, 4, 4),
    ),
    Case("BatchNorm3d in eval mode", lambda: with_statistics(nn.BatchNorm3d(2)), reals(2, 3, 2, 2)),
    Case(
        "Frozen BatchNorm in eval mode before a layer",
        lambda: nn.Sequential(with_statistics(nn.BatchNorm1d(4)).requires_grad_(False), nn.Linear(4, 3)),
        reals(4),
    ),
    Case("LocalResponseNorm", lambda: nn.Sequential(nn.Conv2d(2, 4, 2), nn.LocalResponseNorm(2)), reals(2, 4, 4)),
    Case(
        "A weight of unit length",
        lambda: Net(
            lambda m, x: F.linear(F.normalize(x), F.normalize(m.linear.weight)), linear=nn.Linear(4, 3, bias=False)
        ),
        reals(4),
    ),
    Case(
        "Convolution with a standardised weight",
        lambda: Net(_standardised, conv=nn.Conv2d(2, 3, 3)),
        reals(2, 5, 5),
    ),
)


def _standardised(model: Any, x: Tensor) -> Any:
    weight = model.conv.weight
    deviation, mean = torch.std_mean(weight, dim=(1, 2, 3), keepdim=True)
    return F.conv2d(x, (weight - mean) / (deviation + 1e-5), model.conv.bias)
