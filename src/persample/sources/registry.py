"""Backends by name: `make_source`, `backends`, and how third parties add theirs."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any

from torch import nn

from persample.errors import MissingPackageError, OptionError, UnknownBackendError
from persample.sources.base import PerSampleGradSource

_ENTRY_POINT_GROUP = "persample.backends"


@dataclass(frozen=True)
class Backend:
    """A backend that exists, and whether it can be used here.

    Attributes:
        name: the keyword for `make_source` and `VOGN`.
        location: `"module:class"` of its source.
        install: what to install if it cannot be imported.
        problem: None if it can be imported here, else why not.
    """

    name: str
    location: str
    install: str = ""
    problem: str | None = None

    @property
    def available(self) -> bool:
        """Whether the backend can be imported here."""
        return self.problem is None


_BUILT_IN = (
    Backend("loop", "persample.sources.loop:LoopSource"),
    Backend("hooks", "persample.sources.hooks:HooksSource"),
    Backend("fused", "persample.sources.fused:FusedSource"),
    Backend("backpack", "persample.sources.backpack:BackpackSource", install='pip install "persample[backpack]"'),
    Backend("opacus", "persample.sources.opacus:OpacusSource", install='pip install "persample[opacus]"'),
    Backend("vmap", "persample.sources.vmap:VmapSource"),
)
_registered: dict[str, Backend] = {backend.name: backend for backend in _BUILT_IN}


def make_source(
    backend: str, model: nn.Module, loss_fn: Callable[[Any, Any], Any], **options: Any
) -> PerSampleGradSource:
    """Return a source of per-sample gradients for `model` and `loss_fn`.

    Args:
        backend: a name among `persample.backends()`.
        model: the network; it is not changed.
        loss_fn: `loss_fn(outputs, targets)` returns the loss of each sample, shape `(B,)`, or is a loss module of
            `torch.nn`.
        **options: options of the backend, and `check`: see the class of the backend.

    Raises:
        UnknownBackendError: no backend has this name.
        MissingPackageError: the backend's package is not installed.
        OptionError: the backend has no such option, or the option not this value.
        UnsupportedModelError: the backend cannot serve the model.

    Example:
        >>> import torch, persample
        >>> model = torch.nn.Linear(3, 2)
        >>> source = persample.make_source("loop", model, persample.losses.cross_entropy)
        >>> moments = source.moments(torch.ones(5, 3), torch.tensor([0, 1, 0, 1, 1]))
        >>> moments.batch_size, list(moments.mean)
        (5, ['weight', 'bias'])
    """
    found = _find(backend)
    try:
        source_class = _load(found)
    except ImportError as error:
        hint = f"Run: {found.install}" if found.install else "Install what it needs."
        raise MissingPackageError(f"Backend {backend!r} cannot be imported ({error}). {hint}") from error
    _refuse_unknown_options(backend, source_class, options)
    return source_class(model, loss_fn, **options)


def backends() -> dict[str, Backend]:
    """Return every backend that exists, by name; `.available` says whether it can be imported here."""
    return {name: _with_problem(backend) for name, backend in _all().items()}


def register_backend(name: str, location: str, *, install: str = "") -> None:
    """Add a backend, which `make_source(name, …)` then finds.

    Packages can do without this call: an entry point of the group `persample.backends`, with the name of the backend
    and the value `"module:class"`, is found by itself.

    Args:
        name: its keyword.
        location: `"module:class"` of a subclass of `PerSampleGradSource`, imported when it is first chosen.
        install: the command that installs what it needs, told to users who lack it.

    Raises:
        OptionError: the name is taken by another backend, or the location is not `"module:class"`.
    """
    if location.count(":") != 1:
        raise OptionError(f"location={location!r} must have the form 'module:class'.")
    taken = _all().get(name)
    if taken is not None and taken.location != location:
        raise OptionError(f"Backend {name!r} exists already ({taken.location}): choose another name.")
    _registered[name] = Backend(name, location, install)


def _all() -> dict[str, Backend]:
    found = {point.name: Backend(point.name, point.value) for point in entry_points(group=_ENTRY_POINT_GROUP)}
    return found | _registered


def _find(name: str) -> Backend:
    if name in _registered:
        return _registered[name]  # without a look at all installed packages, which takes as long as a small model
    known = _all()
    if name not in known:
        raise UnknownBackendError(f"There is no backend {name!r}: use one of {', '.join(map(repr, known))}.")
    return known[name]


def _load(backend: Backend) -> type[PerSampleGradSource]:
    module, _, class_name = backend.location.partition(":")
    loaded: type[PerSampleGradSource] = getattr(importlib.import_module(module), class_name)
    return loaded


def _with_problem(backend: Backend) -> Backend:
    try:
        _load(backend)
    except ImportError as error:
        return Backend(backend.name, backend.location, backend.install, problem=str(error))
    return backend


def _refuse_unknown_options(backend: str, source_class: type[PerSampleGradSource], options: dict[str, Any]) -> None:
    allowed = [
        name
        for name, parameter in inspect.signature(source_class).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    ]
    for option in options:
        if option not in allowed:
            raise OptionError(
                f"Backend {backend!r} has no option {option!r}: it takes {', '.join(map(repr, allowed))}."
            )
