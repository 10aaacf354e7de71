"""The Gaussian prior over the weights as data: a mean and a precision for each weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from persample.errors import OptionError


@dataclass(frozen=True, eq=False)
class Prior:
    """A Gaussian prior N(m, 1/λ) over each weight, independent of the others.

    Attributes:
        mean: m of each parameter, keyed by its name in `model.named_parameters()`.
        precision: λ, with the same keys and shapes. An entry of 0 is a flat prior over that weight.

    Raises:
        OptionError: the keys or shapes differ, an entry is not finite, or a precision is negative.
    """

    mean: Mapping[str, Tensor]
    precision: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        require_same_shapes(self.mean, self.precision)
        for name, mean in self.mean.items():
            precision = self.precision[name]
            if not bool(mean.isfinite().all()) or not bool((precision.isfinite() & (precision >= 0)).all()):
                raise OptionError(
                    f"The prior over {name!r} needs a finite mean and a finite precision >= 0 (0 is a flat prior)."
                )

    @staticmethod
    def isotropic(precision: float, like: Mapping[str, Tensor]) -> Prior:
        """Return N(0, 1/precision) over all weights.

        Args:
            precision: λ, one number for all.
            like: tensors with the shapes, dtypes and devices wanted, keyed by the names of the parameters.
        """
        return Prior(
            mean={name: torch.zeros_like(value) for name, value in like.items()},
            precision={name: torch.full_like(value, precision) for name, value in like.items()},
        )


def require_same_shapes(mean: Mapping[str, Tensor], precision: Mapping[str, Tensor]) -> None:
    """Check that mean and precision belong to the same parameters.

    Raises:
        OptionError: they do not; the message names the first parameter that differs.
    """
    if other := sorted(mean.keys() ^ precision.keys()):
        raise OptionError(f"mean and precision must have the same keys, but {other[0]!r} is only in one of them.")
    for name, value in mean.items():
        if value.shape != precision[name].shape:
            raise OptionError(
                f"mean and precision of {name!r} must have the same shape, but have {tuple(value.shape)} and "
                f"{tuple(precision[name].shape)}."
            )
