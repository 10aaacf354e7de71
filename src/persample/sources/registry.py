"""Backends by name: `make_source`, `backends`, and registering third-party backends."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from importlib.metadata import distributions
from inspect import Parameter
from typing import Any

from torch import nn

from persample.errors import MissingPackageError, OptionError, UnknownBackendError
from persample.kernels.compiled import about_kernels
from persample.kernels.gpu import about_triton
from persample.sources.source import PerSampleGradSource

_ENTRY_POINT_GROUP = "persample.backends"


@dataclass(frozen=True)
class Backend:
    """A registered backend, and whether it can be used here.

    Attributes:
        name: the keyword for `make_source` and `VOGN`.
        location: `"module:class"` of its source.
        install: what to install if it cannot be imported.
        problem: None if it can be used here, else why not.
        machineries: the values of its option `machinery`, where it has several ways to compute.
        kernels: whether its kernels in C++, and in Triton on a GPU, compute here, else why not; empty if it has none.
    """

    name: str
    location: str
    install: str = ""
    problem: str | None = None
    machineries: tuple[str, ...] = ()
    kernels: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """Names for `make_source`, one for each machinery, as `"opacus (rules)"`; otherwise its own name only."""
        return tuple(f"{self.name} ({machinery})" for machinery in self.machineries) or (self.name,)

    @property
    def available(self) -> bool:
        """Whether the backend can be used here."""
        return self.problem is None


_BUILT_IN = (
    Backend("loop", "persample.sources.backends.loop:LoopSource"),
    Backend("hooks", "persample.sources.backends.hooks:HooksSource"),
    Backend("fused", "persample.sources.backends.fused:FusedSource"),
    Backend(
        "backpack",
        "persample.sources.backends.external.backpack:BackpackSource",
        install='pip install "persample[backpack]"',
        machineries=("extend", "rules"),
    ),
    Backend(
        "opacus",
        "persample.sources.backends.external.opacus:OpacusSource",
        install='pip install "persample[opacus]"',
        machineries=("module", "rules"),
    ),
    Backend("vmap", "persample.sources.backends.vmap:VmapSource"),
    Backend("vjp", "persample.sources.backends.vjp:VjpSource"),
)
_registered: dict[str, Backend] = {backend.name: backend for backend in _BUILT_IN}


def make_source(
    backend: str, model: nn.Module, loss_fn: Callable[[Any, Any], Any], **options: Any
) -> PerSampleGradSource:
    """Return a source of per-sample gradients for `model` and `loss_fn`.

    Args:
        backend: a name among `persample.backends()`; also with a value of its option `machinery`, as
            `"opacus (rules)"`.
        model: the network; it is not changed.
        loss_fn: `loss_fn(outputs, targets)` returns the loss of each sample, shape `(B,)`, or is a loss module of
            `torch.nn`.
        **options: options of the backend, and `check`: see the class of the backend.

    Raises:
        UnknownBackendError: no backend has this name.
        MissingPackageError: the backend's package is not installed, or fails when it is imported.
        OptionError: the backend has no such option, or the option not this value; or what is registered is no backend.
        UnsupportedModelError: the backend cannot serve the model.

    Example:
        >>> import torch, persample
        >>> model = torch.nn.Linear(3, 2)
        >>> source = persample.make_source("loop", model, persample.losses.cross_entropy)
        >>> moments = source.moments(torch.ones(5, 3), torch.tensor([0, 1, 0, 1, 1]))
        >>> moments.batch_size, list(moments.mean)
        (5, ['weight', 'bias'])
    """
    found, machinery = _find(backend)
    try:
        source_class = _load(found)
    except MissingPackageError as error:
        hint = f"Run: {found.install}" if found.install else "Install what it needs."
        raise MissingPackageError(f"Backend {backend!r} cannot be imported ({error}). {hint}") from error.__cause__
    except OptionError as error:
        raise OptionError(
            f"Backend {backend!r} cannot be used: {error}. Use another one, or report this to its author."
        ) from None
    _refuse_unknown_options(backend, source_class, options)
    if machinery and options.setdefault("machinery", machinery) != machinery:
        raise OptionError(
            f"Backend {backend!r} names one machinery, machinery={options['machinery']!r} another: use {found.name!r}."
        )
    return source_class(model, loss_fn, **options)


def names_side_by_side(options: Collection[str] = ()) -> list[str]:
    """Return the names of all backends, one for each machinery, except where `options` name the machinery."""
    return [
        name for backend in _all().values() for name in ((backend.name,) if backend.name in options else backend.names)
    ]


def name_with(backend: str, ran: str | None) -> str:
    """Return the name of a backend with the machinery that ran, if it has several."""
    return f"{backend} ({ran})" if ran is not None and _find(backend)[1] is None else backend


def backends() -> dict[str, Backend]:
    """Return every registered backend, by name; `.available` says whether it can be used here."""
    found = {name: _with_problem(backend) for name, backend in _all().items()}
    kernels = "; ".join(filter(None, (about_kernels(), about_triton())))
    return found | {"fused": replace(found["fused"], kernels=kernels)}


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
    if location.count(":") != 1 or not all(location.split(":")):
        raise OptionError(f"location={location!r} must have the form 'module:class'.")
    taken = _all().get(name)
    if taken is not None and taken.location != location:
        raise OptionError(f"Backend {name!r} exists already ({taken.location}): choose another name.")
    _registered[name] = Backend(name, location, install)


def _all() -> dict[str, Backend]:
    found: dict[str, Backend] = {}
    for distribution in distributions():
        try:
            points = distribution.entry_points.select(group=_ENTRY_POINT_GROUP)
        except Exception:  # noqa: BLE001 - a damaged file of somebody's package, which other tools will tell
            continue
        for point in points:
            found.setdefault(point.name, Backend(point.name, point.value))
    return found | _registered


def _find(name: str) -> tuple[Backend, str | None]:
    """Return the backend of this name, and the machinery if the name has one, as `"opacus (rules)"`."""
    # Without a look at all installed packages, which takes as long as a small model, if that can be.
    for known in (_registered, None):
        found = _all() if known is None else known
        if name in found:
            return found[name], None
        for backend in found.values():
            if name in backend.names:
                return backend, backend.machineries[backend.names.index(name)]
    raise UnknownBackendError(f"There is no backend {name!r}: use one of {', '.join(map(repr, _all()))}.")


def _load(backend: Backend) -> type[PerSampleGradSource]:
    """Return the class of a backend.

    Raises:
        MissingPackageError: its module cannot be imported, whatever happens there.
        OptionError: the module has no such class, or it is no backend.
    """
    location = backend.location.partition("[")[0].strip()  # an entry point may name extras of its package
    module_name, _, class_name = location.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
        for attribute in class_name.split("."):
            found = getattr(found, attribute, None)
    except ImportError as error:
        raise MissingPackageError(_one_line(error)) from error
    except (Exception, SystemExit) as error:  # the code of a third party
        raise MissingPackageError(f"{type(error).__name__}: {_one_line(error)}") from error
    if not (isinstance(found, type) and issubclass(found, PerSampleGradSource)):
        raise OptionError(f"{location!r} is not a subclass of persample.PerSampleGradSource")
    if lacking := sorted(found.__abstractmethods__):
        raise OptionError(f"{location!r} does not implement {', '.join(lacking)}")
    if "check" not in _options_of(found):
        raise OptionError(f"{location!r} takes neither the keyword argument 'check' nor **options")
    return found


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _with_problem(backend: Backend) -> Backend:
    try:
        _load(backend)
    except (MissingPackageError, OptionError) as error:
        return replace(backend, problem=str(error))
    return backend


def _refuse_unknown_options(backend: str, source_class: type[PerSampleGradSource], options: dict[str, Any]) -> None:
    allowed = _options_of(source_class)
    for option in options:
        if option not in allowed:
            raise OptionError(
                f"Backend {backend!r} has no option {option!r}: it takes {', '.join(map(repr, allowed))}."
            )


def _options_of(source_class: type[PerSampleGradSource]) -> list[str]:
    """The names of the keyword arguments of `__init__` beyond model and loss, including those behind `**options`."""
    names: dict[str, None] = {}
    for base in source_class.__mro__:
        if "__init__" not in vars(base):
            continue
        parameters = list(inspect.signature(vars(base)["__init__"]).parameters.values())
        by_position = parameters[:3]  # self, model, loss_fn
        for parameter in parameters:
            if parameter.kind is Parameter.KEYWORD_ONLY or (
                parameter.kind is Parameter.POSITIONAL_OR_KEYWORD and parameter not in by_position
            ):
                names[parameter.name] = None
        if not any(parameter.kind is Parameter.VAR_KEYWORD for parameter in parameters):
            break
    return list(names)
