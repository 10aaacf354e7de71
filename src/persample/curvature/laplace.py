"""The diagonal Laplace approximation: a posterior from a trained network, without retraining."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from persample.curvature.fisher import fisher
from persample.curvature.information import Fisher
from persample.dtypes import at_least_float32
from persample.errors import OptionError
from persample.vogn import Posterior
from persample.vogn.prediction import telling


def laplace(
    model: nn.Module,
    loader: Iterable[Any] | Fisher,
    *,
    loss_fn: Callable[[Any, Any], Any] | None = None,
    prior_precision: float | Literal["marginal likelihood"] = "marginal likelihood",
    **of_fisher: Any,
) -> Posterior:
    """Return the Gaussian posterior N(w, 1 / (N F + λ)) around the weights w of a trained network.

    With the prior N(0, 1/λ) over each weight, the evidence of the approximation depends on λ by

        L(λ) = ½ Σ_j (log λ − log(N F_j + λ) − λ w_j²),

    whose maximum is a fixed point of λ = Σ_j N F_j / (N F_j + λ) / Σ_j w_j². Source: MacKay, "A Practical Bayesian
    Framework for Backpropagation Networks", Neural Computation 1992; Daxberger et al., "Laplace Redux", NeurIPS 2021.

    Args:
        model: the trained network. It becomes the posterior's.
        loader: the training data, as for `persample.fisher`; or what that returned.
        loss_fn: as for `persample.fisher`; needed with a loader. The posterior predicts by it, see `Posterior.predict`.
        prior_precision: λ > 0; by default the one of the largest evidence.
        of_fisher: kind, draws, backend and the like, as for `persample.fisher`.

    Raises:
        OptionError: `prior_precision` is not allowed; `loss_fn` is missing; a `Fisher` belongs to another model; or the
            evidence has no maximum, because all weights, or all curvatures, are 0.
        PersampleError: as `persample.fisher`.
    """
    if isinstance(loader, Fisher):
        if of_fisher:
            raise OptionError(
                f"A Fisher information was given, so there is nothing left to compute: omit {', '.join(of_fisher)}."
            )
        information = loader
    else:
        if loss_fn is None:
            raise OptionError("loss_fn is missing: pass the per-sample loss that the network was trained with.")
        information = fisher(model, loader, loss_fn=loss_fn, **of_fisher)
    own = dict(model.named_parameters())
    for name, value in information.diagonal.items():
        if name not in own or own[name].shape != value.shape:
            raise OptionError(
                f"The Fisher information has {name!r}, which this model does not have: it belongs to another model."
            )
    mean = {name: at_least_float32(own[name].detach()).clone() for name in information.diagonal}
    curvature = {name: information.data_size * value for name, value in information.diagonal.items()}
    if prior_precision == "marginal likelihood":
        precision = best_prior_precision(list(mean.values()), list(curvature.values()))
    elif isinstance(prior_precision, bool | str) or not 0 < prior_precision < math.inf:
        raise OptionError(f'prior_precision={prior_precision!r} must be a number > 0, or "marginal likelihood".')
    else:
        precision = float(prior_precision)
    of_weights = {name: (value + precision).to(mean[name]) for name, value in curvature.items()}
    return Posterior(mean, of_weights, model, telling(loss_fn))


def best_prior_precision(mean: list[Tensor], curvature: list[Tensor]) -> float:
    """Return the λ at which the evidence of the Laplace approximation is largest.

    Args:
        mean: w of each parameter.
        curvature: N F of each parameter.

    Raises:
        OptionError: there is no largest.
    """
    squares = sum(m.double().square().sum().item() for m in mean)
    values = torch.cat([c.flatten().double() for c in curvature])
    if not squares > 0 or not bool((values > 0).any()):
        raise OptionError(
            "The evidence has no maximum over prior_precision, because all weights or all curvatures are 0: pass "
            "prior_precision as a number."
        )
    # γ(λ)/λ falls from infinity to 0, so Σ NF/(NF + λ) = λ Σ w² has exactly one solution: bisection in log λ.
    low, high = math.log(1e-30), math.log(len(values) / squares + 1e-30)
    for _ in range(200):
        middle = 0.5 * (low + high)
        precision = math.exp(middle)
        if (values / (values + precision)).sum().item() > precision * squares:
            low = middle
        else:
            high = middle
    return math.exp(0.5 * (low + high))
