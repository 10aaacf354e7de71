"""Checking a backend's return values against its contract.

Whoever needs a result of a backend asks here. The checks look at kinds, shapes and dtypes only; whether the numbers
are right, the self-check asks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from persample.errors import ContractError
from persample.moments import Moments
from persample.sources.batch import Batch
from persample.sources.contract import Contract
from persample.sources.model.usage import Use

#: What a user can do about a backend that is wrong.
ADVICE = (
    "Use another backend for this model ('loop' runs every model that has per-sample gradients), and "
    "please report it with the model's code."
)


def moments_of(source: Contract, batch: Batch) -> Moments:
    """Return what `source.compute_moments` returns for `batch`.

    Raises:
        ContractError: that breaks the contract.
    """
    found: Any = source.compute_moments(batch)
    if not isinstance(found, Moments):
        raise _broken(source, f"{_kind(found)} from compute_moments", "persample.Moments")
    parameters = source.parameters()
    require_losses(source, found.losses, batch.size)
    _require_gradients(source, "mean gradient", found.mean, parameters)
    _require_gradients(source, "second moment", found.second_moment, parameters)
    return found


def per_sample_of(source: Contract, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Return what `source.compute_per_sample` returns for `batch`: the losses and the per-sample gradients.

    Raises:
        ContractError: that breaks the contract.
    """
    found: Any = source.compute_per_sample(batch)
    if not isinstance(found, tuple) or len(found) != 2:
        kind = f"{len(found)} values" if isinstance(found, tuple) else _kind(found)
        raise _broken(source, f"{kind} from compute_per_sample", "the losses and the per-sample gradients")
    losses, gradients = found
    require_losses(source, losses, batch.size)
    _require_gradients(source, "per-sample gradient", gradients, source.parameters(), batch.size)
    return losses, gradients


def uses_of(source: Contract, batch: Batch | None) -> Iterator[Use]:
    """Yield what `source.find_uses` returns for `batch`.

    Raises:
        ContractError: that breaks the contract.
    """
    found: Any = source.find_uses(batch)
    if not isinstance(found, Iterable):
        raise _broken(source, f"{_kind(found)} from find_uses", "an iterable of Use")
    for use in found:
        if not isinstance(use, Use):
            raise _broken(source, f"{_kind(use)} among what find_uses found", "an iterable of Use")
        yield use


def require_losses(source: Contract, losses: Any, size: int) -> None:
    """Raise `ContractError` unless `losses` are `size` real numbers without a graph."""
    if not isinstance(losses, Tensor) or losses.shape != (size,) or not losses.is_floating_point():
        raise _broken(source, f"{_kind(losses)} as losses", f"{size} real numbers, of shape {(size,)}")
    if losses.requires_grad:
        raise _broken(source, "losses with their graph", "detached ones")


def _require_gradients(
    source: Contract, what: str, found: Any, parameters: Mapping[str, nn.Parameter], size: int | None = None
) -> None:
    """Raise unless `found` has a tensor like each of `parameters`, with `size` rows if a size is given."""
    if not isinstance(found, Mapping):
        raise _broken(source, f"{_kind(found)} as {what}", "a dict by the names of the parameters")
    if list(found) != list(parameters):
        raise _broken(source, f"a {what} for {_other_names(found, parameters)}", "one for each parameter, in order")
    rows = () if size is None else (size,)
    for name, p in parameters.items():
        value = found[name]
        if not isinstance(value, Tensor) or value.shape != (*rows, *p.shape):
            samples = "" if size is None else f"{size} samples of "
            expected = f"{samples}shape {tuple(p.shape)} as {what}"
            raise _broken(source, f"{_kind(value)} for parameter {name!r}", expected)
        if value.dtype != p.dtype or value.device != p.device or value.layout != torch.strided:
            raise _broken(
                source,
                f"{value.dtype} on {value.device} ({value.layout}) for parameter {name!r}",
                f"{p.dtype} on {p.device} ({torch.strided}) as {what}, as the parameter's",
            )
        if value.requires_grad:
            raise _broken(source, f"a {what} of {name!r} with its graph", "a detached one")


def _other_names(found: Mapping[str, Any], parameters: Mapping[str, Any]) -> str:
    missing = [name for name in parameters if name not in found]
    unknown = [str(name) for name in found if name not in parameters]
    if not missing and not unknown:
        return "the parameters in another order than model.named_parameters()"
    told = [*missing, *(f"{name} (unknown)" for name in unknown)]
    return f"other parameters than the model's: {', '.join(told)}"


def name_of(source: Contract) -> str:
    """Return how errors name a backend."""
    return type(source).__name__


def _broken(source: Contract, found: str, expected: str) -> ContractError:
    return ContractError(f"Backend {name_of(source)} returned {found}, but expected {expected}. {ADVICE}")


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype} and shape {tuple(value.shape)}"
    return "None" if value is None else f"an object of type {type(value).__name__}"
