"""`Course`: what one training has in common for all methods: network, data, epochs, seed, device."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from persample.experiments.data import ImageDataset
from persample.experiments.models import model_for
from persample.experiments.seeds import Purpose, derive_seed


@dataclass(frozen=True, kw_only=True)
class Course:
    """One training.

    Attributes:
        data: What to train on, and what to predict, on the device.
        outside: Images of another kind, as inputs of the network; to be unsure about.
        epochs: Passes over the data.
        batch_size: Samples per step; the last batch of an epoch may be smaller.
        seed: What first weights, order and noise come from.
        device: Where it is computed.
        eager: Whether `VOGN` shall not replay its steps as CUDA graphs on a GPU.
    """

    data: ImageDataset
    outside: Tensor
    epochs: int
    batch_size: int
    seed: int
    device: torch.device
    eager: bool = False

    def network(self) -> nn.Sequential:
        """Build the network of the data set, with the first weights of the seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(self.seed, "weights"))
            return model_for(self.data.name).to(self.device)

    def generator(self, purpose: Purpose) -> torch.Generator:
        """Return a new generator on the device."""
        return torch.Generator(self.device).manual_seed(derive_seed(self.seed, purpose) % 2**63)

    @property
    def fused(self) -> bool | None:
        """Whether PyTorch's optimizers should update all weights by one kernel."""
        return True if self.device.type == "cuda" else None


def on_device(data: ImageDataset, device: torch.device) -> ImageDataset:
    """Return the data set with its tensors on the device."""
    tensors = ("train_inputs", "train_targets", "test_inputs", "test_targets")
    return replace(data, **{name: getattr(data, name).to(device) for name in tensors})
