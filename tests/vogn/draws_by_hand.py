"""The outputs under draws of the weights, as an independent truth."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from persample import Posterior
from persample.testing.devices import generator_of


def seeded(seed: int = 0) -> torch.Generator:
    return generator_of(seed)


def outputs_by_hand(model: nn.Module, posterior: Posterior, inputs: Tensor, draws: int) -> np.ndarray[Any, Any]:
    """The outputs under each draw: one draw after the other written into the model, as an independent truth."""
    generator, params, outputs = seeded(), dict(model.named_parameters()), []
    with torch.no_grad():
        before = {name: p.clone() for name, p in params.items()}
        for _ in range(draws):
            sizes = [mean.numel() for mean in posterior.mean.values()]
            noise = torch.randn(sum(sizes), dtype=next(iter(params.values())).dtype, generator=generator).split(sizes)
            for (name, mean), part in zip(posterior.mean.items(), noise, strict=True):
                params[name].copy_(mean + part.view(mean.shape) / posterior.precision[name].sqrt())
            outputs.append(model(inputs).double().numpy(force=True).copy())
        for name, p in params.items():
            p.copy_(before[name])
    return np.stack(outputs)


def broad_posterior(model: nn.Module) -> Posterior:
    """Draws from it differ much."""
    params = dict(model.named_parameters())
    return Posterior(
        {name: p.detach().clone() for name, p in params.items()},
        {name: torch.full_like(p, 4.0, requires_grad=False) for name, p in params.items()},
        model,
    )
