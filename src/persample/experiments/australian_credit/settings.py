"""The methods, their settings, and the published scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from torch import nn

from persample import losses
from persample.experiments.data.australian import FEATURES
from persample.vogn import VOGN, MeanFieldVI, Vadam, VariationalOptimizer

Method: TypeAlias = Literal["VOGN", "Vadam", "mean-field VI"]
METHODS: tuple[Method, ...] = get_args(Method)

_EPOCHS_PER_ROW = 16


@dataclass(frozen=True)
class Setting:
    """How a network is trained.

    Attributes:
        method: The optimizer.
        batch_size: Samples per step.
        draws: Draws of the weights per step.
    """

    method: Method
    batch_size: int
    draws: int

    @property
    def epochs(self) -> int:
        """Passes over the training data, chosen so that all batch sizes take about the same number of steps."""
        return _EPOCHS_PER_ROW * self.batch_size


@dataclass(frozen=True)
class Published:
    """The scores of the one run that was published, in nats; see `Score` for what they mean."""

    negative_elbo: float
    test_log_loss: float


PUBLISHED = {
    Setting("VOGN", 1, 1): Published(0.938, 0.384),
    Setting("VOGN", 16, 16): Published(0.863, 0.379),
    Setting("VOGN", 128, 16): Published(0.841, 0.353),
    Setting("Vadam", 1, 1): Published(0.944, 0.392),
    Setting("Vadam", 16, 16): Published(1.061, 0.443),
    Setting("Vadam", 128, 16): Published(1.020, 0.486),
    Setting("mean-field VI", 1, 1): Published(3.057, 1.760),
    Setting("mean-field VI", 16, 16): Published(1.033, 0.444),
    Setting("mean-field VI", 128, 16): Published(0.929, 0.433),
}


def make_model() -> nn.Sequential:
    """Build the network, one hidden layer of 64 ReLUs, with weights from torch's global random generator.

    Returns:
        A model from (B, 14) to logits (B,).
    """
    return nn.Sequential(nn.Linear(FEATURES, 64), nn.ReLU(), nn.Linear(64, 1), nn.Flatten(0))


def make_optimizer(setting: Setting, model: nn.Module, data_size: int, noise: torch.Generator) -> VariationalOptimizer:
    """Return an optimizer with the published settings.

    They are: prior N(0, 1), learning rate 0.001, decay 0.999, and a posterior of precision 1 to begin with. That is the
    prior's precision, so the first curvature is 0. VOGN divides by the new curvature.

    Args:
        setting: The method, and how many draws it takes for a step.
        model: The network.
        data_size: The number of training samples.
        noise: Source of the noise.
    """
    if setting.method == "VOGN":
        return VOGN(
            model,
            losses.bernoulli,
            data_size=data_size,
            lr=1e-3,
            prior_precision=1.0,
            decay=0.999,
            hess_init=0.0,
            order="updated",
            momentum=0.0,
            temperature=1.0,
            mc_samples=setting.draws,
            backend="fused",
            backend_options={"deterministic": True},
            generator=noise,
        )
    if setting.method == "Vadam":
        return Vadam(
            model,
            losses.bernoulli,
            data_size=data_size,
            lr=1e-3,
            betas=(0.9, 0.999),
            prior_precision=1.0,
            hess_init=0.0,
            mc_samples=setting.draws,
            generator=noise,
        )
    return MeanFieldVI(
        model,
        losses.bernoulli,
        data_size=data_size,
        lr=1e-3,
        betas=(0.9, 0.999),
        prior_precision=1.0,
        scale_init=1.0,
        mc_samples=setting.draws,
        generator=noise,
    )
