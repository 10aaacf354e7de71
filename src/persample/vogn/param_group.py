"""`Part`: the parameters of one group with states and settings, the input of a rule."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from persample.dtypes import at_least_float32
from persample.vogn import core
from persample.vogn.core import Tensors
from persample.vogn.settings import temperature_at


@dataclass(frozen=True)
class Part:
    """Parameters of one group, and what a rule needs to know about them.

    Attributes:
        settings: the settings of the group.
        names: the names of the parameters.
        mean: the parameters μ, in at least float32.
        states: the state of each.
        data_size: N, with the factor for augmented data.
        prior_precision: λ, a number or one tensor for each parameter.
        prior_mean: m₀, likewise.
        temperature: τ at this step.
    """

    settings: Mapping[str, Any]
    names: list[str]
    mean: list[Tensor]
    states: list[dict[str, Any]]
    data_size: float
    prior_precision: float | Tensors
    prior_mean: float | Tensors
    temperature: float

    @property
    def objective(self) -> dict[str, Any]:
        """N, λ and τ, as the functions of `core` take them."""
        return {
            "data_size": self.data_size,
            "prior_precision": self.prior_precision,
            "temperature": self.temperature,
        }

    def with_prior(self, gradient: Tensors) -> Tensors:
        """Return a gradient with that of the prior at the means, see `core.add_prior`."""
        return core.add_prior(gradient, self.mean, prior_mean=self.prior_mean, **self.objective)

    def state(self, key: str) -> list[Any]:
        """Return one entry of the state of each parameter."""
        return [state[key] for state in self.states]

    def of(self, values: Mapping[str, Tensor]) -> list[Tensor]:
        """Return the `values` of the parameters, by name, in their dtypes and on their devices."""
        return [values[name].to(mean) for name, mean in zip(self.names, self.mean, strict=True)]

    def per_weight(self, value: float | Tensors) -> dict[str, Tensor]:
        """Return a setting as one tensor for each parameter, by name."""
        if isinstance(value, list | tuple):
            return dict(zip(self.names, value, strict=True))
        return {name: torch.full_like(mean, value) for name, mean in zip(self.names, self.mean, strict=True)}

    @property
    def is_flat(self) -> bool:
        """Whether the prior has precision 0 somewhere."""
        if isinstance(self.prior_precision, list | tuple):
            return any(bool((precision == 0).any()) for precision in self.prior_precision)
        return self.prior_precision == 0


def make_part(
    group: Mapping[str, Any],
    state_of: Callable[[Tensor, Mapping[str, Any]], dict[str, Any]],
    *,
    data_size: float,
    step: int,
    names: Iterable[str],
) -> Part:
    """Return the parameters called `names` of a group.

    Args:
        group: a parameter group of the optimizer.
        state_of: gives the state of a parameter of a group.
        data_size: N.
        step: how many steps were taken.
        names: names of parameters; those that are not in the group are passed over.
    """
    wanted = set(names)
    places = [place for place, name in enumerate(group["param_names"]) if name in wanted]
    params = [group["params"][place] for place in places]
    mean = [at_least_float32(p.detach()) for p in params]

    def of_weights(setting: str) -> Any:
        value = group[setting]
        if not isinstance(value, list):
            return value
        return [value[place].to(m) for place, m in zip(places, mean, strict=True)]

    return Part(
        settings=group,
        names=[group["param_names"][place] for place in places],
        mean=mean,
        states=[state_of(p, group) for p in params],
        data_size=data_size,
        prior_precision=of_weights("prior_precision"),
        prior_mean=of_weights("prior_mean"),
        temperature=temperature_at(group, step),
    )
