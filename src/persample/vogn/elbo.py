"""The evidence lower bound, estimated by draws of the weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from persample.losses import as_per_sample
from persample.sources.model.calling import losses_of


@dataclass(frozen=True, eq=False)
class Elbo:
    """Estimate of the evidence lower bound E_q[log p(D | w)] − KL(q ‖ prior), in nats.

    Attributes:
        log_likelihoods: Σ_i log p(D_i | w_k) over all N training samples for each draw k, shape `(K,)`, float64.
        kl: KL(q ‖ prior), exact.
        data_size: N, the number of training samples.
    """

    log_likelihoods: Tensor
    kl: float
    data_size: int

    @property
    def log_likelihood(self) -> float:
        """E_q[log p(D | w)], the average over the draws."""
        return self.log_likelihoods.mean().item()

    @property
    def total(self) -> float:
        """The bound for all N training samples: `log_likelihood` − `kl`."""
        return self.log_likelihood - self.kl

    @property
    def per_sample(self) -> float:
        """`total` / N."""
        return self.total / self.data_size

    @property
    def standard_error(self) -> float:
        """Standard error of `total` from the spread over the draws; NaN for a single draw."""
        return self.log_likelihoods.std().item() / math.sqrt(len(self.log_likelihoods))


class LikelihoodTable:
    """Collects log p(target_i | input_i, w_k), chunk by chunk of draws."""

    def __init__(self, loss_fn: Callable[[Any, Any], Any], targets: Any) -> None:
        self._loss_fn = as_per_sample(loss_fn)
        self._targets = targets
        self._rows: list[Tensor] = []

    def add(self, outputs: Tensor) -> None:
        """Add the outputs of some draws, shape `(k, B, …)`.

        A loss that was written for an object with `.logits` finds them there, as in `observe`.
        """
        for row in outputs:
            row.logits = row.view_as(row)
            self._rows.append(-losses_of(self._loss_fn, row, self._targets, len(row)))

    def result(self) -> Tensor:
        """The table, shape `(K, B)`."""
        return torch.stack(self._rows)
