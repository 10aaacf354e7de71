"""laplace-torch: diagonals of the Fisher information by this package, as its curvature backends.

from laplace import Laplace
from persample.integrations.laplace import EmpiricalFisher

la = Laplace(model, "classification", subset_of_weights="all", hessian_structure="diag", backend=EmpiricalFisher)
la.fit(loader)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from persample.errors import MissingPackageError, OptionError
from persample.likelihoods import Categorical, Gaussian, TargetDistribution
from persample.sources import make_source
from persample.vogn.settings import require_count, require_generator

try:
    from laplace.curvature import EFInterface
except ImportError as error:
    raise MissingPackageError(
        f"persample.integrations.laplace needs laplace-torch ({error}); run: pip install laplace-torch"
    ) from error


class EmpiricalFisher(EFInterface):  # type: ignore[misc, unused-ignore]
    """The empirical Fisher information Σ_i g_i², with g_i the gradient of −log p(y_i | x_i, w).

        Laplace(model, "classification", subset_of_weights="all", hessian_structure="diag", backend=EmpiricalFisher)

    It needs memory for as many numbers as the model has weights, where laplace-torch's own backends keep the gradients
    of all samples of a batch. The likelihood is laplace-torch's: cross-entropy, or ½ (y − f)² for each real number.
    For real numbers its own `EFInterface` gives twice as much, as it multiplies the square of the gradient of (y − f)²
    by ½; this is Σ_i g_i² as it is written.

    Jacobians, for predictions by linearisation, are laplace-torch's. `full` keeps the gradients of a batch.

    Args:
        model: the network; laplace-torch gives it, as it does the next five.
        likelihood: "classification" or "regression".
        last_layer: whether only the last layer is meant.
        subnetwork_indices: which weights are meant; None is all.
        dict_key_x: where the inputs are in a batch that is a dict.
        dict_key_y: where its targets are.
        backend: name of the source of per-sample gradients; pass it as `backend_kwargs={"backend": "vmap"}`.
        backend_options: options of that source.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: str,
        last_layer: bool = False,
        subnetwork_indices: Tensor | None = None,
        dict_key_x: str = "input_ids",
        dict_key_y: str = "labels",
        backend: str = "fused",
        backend_options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(model, likelihood, last_layer, subnetwork_indices, dict_key_x, dict_key_y)
        self._distribution: TargetDistribution = Gaussian() if likelihood == "regression" else Categorical()
        self._source = make_source(backend, model, self._losses, **dict(backend_options or {}))

    def diag(self, x: Any, y: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        """Return the loss of a batch, and the diagonal over it, shape `(P,)`.

        Args:
            x: the inputs.
            y: the targets.
        """
        loss = self._loss(x, y)
        total = torch.zeros(())
        for targets, weight in self._targets(x, y):
            moments = self._source.moments((x,), targets)
            total = total.to(loss.device) + weight * moments.batch_size * self._flat(moments.second_moment)
        return loss, total

    def full(self, x: Any, y: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        """Return the loss of a batch, and the matrix Σ_i g_i g_iᵀ, shape `(P, P)`."""
        loss = self._loss(x, y)
        total = torch.zeros(())
        for targets, weight in self._targets(x, y):
            rows = self._rows(x, targets)
            total = total.to(loss.device) + weight * rows.T @ rows
        return loss, total

    def kron(self, *_: Any, **__: Any) -> Any:
        """Refuse Kronecker factors, laplace-torch's default.

        Raises:
            OptionError: always.
        """
        raise OptionError(
            f"{type(self).__name__} has no Kronecker factors, which laplace-torch takes by default: pass Laplace(..., "
            'hessian_structure="diag"), or "full".'
        )

    def gradients(self, x: Any, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return g_i for the targets of the data, shape `(B, P)`, and the loss."""
        return self._rows(x, y), self._loss(x, y)

    def _targets(self, x: Any, y: Tensor) -> Iterator[tuple[Tensor, float]]:
        """The targets of each pass over a batch, and what the pass weighs."""
        yield y, 1.0

    def _losses(self, outputs: Any, targets: Tensor) -> Tensor:
        losses: Tensor = self._distribution(_logits(outputs), targets)
        return losses

    @torch.no_grad()
    def _loss(self, x: Any, y: Tensor) -> Tensor:
        loss: Tensor = self.factor * self.lossfunc(_logits(self.model(x)), y)  # without the constant of the Gaussian
        return loss

    def _rows(self, x: Any, targets: Tensor) -> Tensor:
        gradients = self._source.per_sample((x,), targets)
        return self._flat({name: g.flatten(1) for name, g in gradients.items()}, dim=1)

    def _flat(self, values: Mapping[str, Tensor], dim: int = 0) -> Tensor:
        """What belongs to laplace-torch's parameters, in their order, as one vector, or as one for each row."""
        names = {id(p): name for name, p in self.model.named_parameters()}
        parts = [values[names[id(p)]] for p in self.params]
        flat = torch.cat([part if dim else part.flatten() for part in parts], dim)
        return flat if self.subnetwork_indices is None else flat[..., self.subnetwork_indices]


class MonteCarloFisher(EmpiricalFisher):
    """The Fisher information Σ_i Σ_k g_i(y_ik)² / K, with K targets for each sample that are drawn from the model.

    Args:
        args: as for `EmpiricalFisher`.
        draws: K; pass it as `backend_kwargs={"draws": 4}`.
        generator: source of the targets; None is PyTorch's global generator.
        kwargs: as for `EmpiricalFisher`.
    """

    def __init__(self, *args: Any, draws: int = 1, generator: torch.Generator | None = None, **kwargs: Any) -> None:
        self.draws = require_count("draws", draws)
        require_generator("generator", generator)
        self.generator = generator
        super().__init__(*args, **kwargs)

    def _targets(self, x: Any, y: Tensor) -> Iterator[tuple[Tensor, float]]:
        with torch.no_grad():
            outputs = _logits(self.model(x))
        for _ in range(self.draws):
            yield self._distribution.draw_for(outputs, y, self.generator), 1.0 / self.draws


def _logits(outputs: Any) -> Tensor:
    logits: Tensor = getattr(outputs, "logits", outputs)
    return logits
