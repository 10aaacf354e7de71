"""What a loss says of the distribution of the targets: how to draw them, and the Fisher information of the outputs."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from persample import losses
from persample.errors import UsageError

_SETTINGS = {"weight": None, "label_smoothing": 0.0, "pos_weight": None}


@dataclass(frozen=True)
class OutputModel:
    """The distribution of the targets, given the outputs of the model.

    Attributes:
        family: "categorical" (logits, classes in dim 1), "bernoulli" (logits) or "gaussian" (means).
        precision: 1/variance of the noise of a Gaussian.
    """

    family: Literal["categorical", "bernoulli", "gaussian"]
    precision: float = 1.0

    def draw(self, outputs: Tensor, generator: torch.Generator | None) -> Tensor:
        """Draw a target for each output."""
        if self.family == "categorical":
            probabilities = outputs.movedim(1, -1).softmax(-1)
            rows = probabilities.reshape(-1, probabilities.shape[-1])
            return torch.multinomial(rows, 1, generator=generator).view(probabilities.shape[:-1])
        if self.family == "bernoulli":
            return torch.bernoulli(outputs.sigmoid(), generator=generator)
        noise = torch.randn(outputs.shape, generator=generator, device=outputs.device, dtype=outputs.dtype)
        return outputs + noise / math.sqrt(self.precision)

    def roots(self, outputs: Tensor) -> Iterator[Tensor]:
        """Yield vectors v_c with Σ_c v_c v_cᵀ the Fisher information of the outputs of each sample.

        Categorical: v_c = sqrt(p_c) (p − e_c), as diag(p) − p pᵀ = Σ_c p_c (p − e_c)(p − e_c)ᵀ. The others have
        independent entries: v_c = sqrt(p (1 − p)) e_c, or sqrt(precision) e_c.

        Raises:
            UsageError: logits of classes have positions, for which the sum would be over more than the classes.
        """
        if self.family == "categorical":
            if outputs.dim() != 2:
                raise UsageError(
                    f'kind="exact" needs logits of shape (B, C), but the model returned {tuple(outputs.shape)}: use '
                    'kind="mc".'
                )
            p = outputs.softmax(1)
            for c in range(p.shape[1]):
                e = torch.zeros_like(p)
                e[:, c] = 1
                yield p[:, c : c + 1].sqrt() * (p - e)
            return
        p = outputs.sigmoid()
        root = (p * (1 - p)).sqrt() if self.family == "bernoulli" else torch.full_like(p, math.sqrt(self.precision))
        rows = root.reshape(len(root), -1)
        for c in range(rows.shape[1]):
            v = torch.zeros_like(rows)
            v[:, c] = rows[:, c]
            yield v.view(outputs.shape)


def output_model(loss_fn: Callable[..., Any]) -> OutputModel:
    """Return what a loss of this package or of PyTorch says of the targets.

    Raises:
        UsageError: nobody can tell from it, or it is weighted.
    """
    keywords: dict[str, Any] = {}
    while isinstance(loss_fn, functools.partial):
        keywords = {**loss_fn.keywords, **keywords}
        loss_fn = loss_fn.func
    weighted = [n for n, plain in _SETTINGS.items() if keywords.get(n, getattr(loss_fn, n, plain)) not in (plain, None)]
    if not weighted:
        if loss_fn in (losses.cross_entropy, F.cross_entropy) or isinstance(loss_fn, nn.CrossEntropyLoss):
            return OutputModel("categorical")
        if loss_fn in (losses.bernoulli, F.binary_cross_entropy_with_logits) or isinstance(
            loss_fn, nn.BCEWithLogitsLoss
        ):
            return OutputModel("bernoulli")
        if loss_fn is losses.gaussian:
            return OutputModel("gaussian", float(keywords.get("noise_precision", 1.0)))
    reason = f"it has {weighted[0]}" if weighted else "it is none of those"
    raise UsageError(
        'kind="mc" and kind="exact" need a loss that is a distribution of the targets: persample.losses.cross_entropy, '
        f"bernoulli or gaussian, or cross entropy of PyTorch without weights ({reason}). "
        'kind="empirical" takes every loss.'
    )


def logits_of(outputs: Any) -> Tensor:
    """Return the tensor of outputs: themselves, or their `logits`.

    Raises:
        UsageError: there is none.
    """
    found = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", outputs)
    if not isinstance(found, Tensor) or not found.is_floating_point():
        raise UsageError(
            f'The model returned {type(outputs).__name__}, of which kind="mc" and kind="exact" need one tensor of '
            "floating-point numbers: let it return that, or an object with .logits."
        )
    return found
