"""Elastic weight consolidation: earlier knowledge as a penalty on the weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from persample.errors import OptionError
from persample.vogn import Posterior, Prior


def ewc_penalty(model: nn.Module, before: Posterior | Prior) -> Tensor:
    """Return ½ Σ_j λ_j (w_j − m_j)², the negative log-density of the earlier posterior, up to a constant.

    For a mean loss over N samples of the new task add `ewc_penalty(model, before) / N`. With
    `before = persample.laplace(model, old_loader, loss_fn=…)` it is the penalty of Kirkpatrick et al., "Overcoming
    catastrophic forgetting in neural networks", PNAS 2017, with the strength that follows from the number of old
    samples. `VOGN(..., prior=before.as_prior())` needs no penalty: it is its prior.

    Args:
        model: the network, as it is now.
        before: what was learned before; N(m, 1/λ) over each weight.

    Returns:
        A scalar, differentiable in the parameters.

    Raises:
        OptionError: `before` is of another model, or neither a posterior nor a prior.
    """
    if not isinstance(before, Posterior | Prior):
        raise OptionError(
            f"before is of type {type(before).__name__}: pass a posterior or a prior, such as persample.laplace(model, "
            "loader, loss_fn=...), which takes a Fisher information in place of the loader, too."
        )
    own = dict(model.named_parameters())
    terms = []
    for name, mean in before.mean.items():
        if name not in own or own[name].shape != mean.shape:
            raise OptionError(
                f"The model has no parameter {name!r} of shape {tuple(mean.shape)}: pass the model that the prior was "
                "computed from."
            )
        distance = own[name] - mean.to(own[name])
        terms.append((before.precision[name].to(own[name]) * distance.square()).sum())
    return 0.5 * torch.stack(terms).sum()
