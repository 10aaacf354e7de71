"""`fix`: a copy of a model without the BatchNorms that mix the samples."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _LazyNormBase

from persample.checks.behind_batch_norm import children_behind, hooks_of, without_hooks
from persample.checks.copies import copy_of
from persample.errors import OptionError, UnsupportedModelError
from persample.frozen_batch_norm import FrozenBatchNorm
from persample.sources.model.refusals import describe, foreign_parameters

Replacement = Literal["group_norm", "frozen"]

_MOST_GROUPS = 32
_FEWEST_CHANNELS = 4
_KNOWN_FORWARDS = {_BatchNorm.forward, nn.SyncBatchNorm.forward}


@dataclass(frozen=True)
class Change:
    """One module that `fix` replaced.

    Attributes:
        paths: where it is in the model; several places if they hold the same module.
        before: the BatchNorm, as PyTorch prints it.
        after: what stands there now.
    """

    paths: tuple[str, ...]
    before: str
    after: str

    def __str__(self) -> str:
        return f"{', '.join(path or 'the model' for path in self.paths)}: {self.before} → {self.after}"


class Fixed(NamedTuple):
    """What `fix` returns: `model, changes = persample.fix(model)`.

    Attributes:
        model: the copy.
        changes: what was replaced in it, in the model's order.
    """

    model: nn.Module
    changes: tuple[Change, ...]

    def __str__(self) -> str:
        return "\n".join(map(str, self.changes)) or "nothing to change"


def fix(model: nn.Module, batch_norm: Replacement = "group_norm", *, groups: int | None = None) -> Fixed:
    """Return a copy of `model` in which no BatchNorm mixes the samples, and the list of changes.

    The given model is not changed. The copy keeps scales and shifts with their dtype, device and `requires_grad`,
    hooks and training flags; a BatchNorm that is at two places is one module there, too.

    Args:
        model: the network.
        batch_norm: what stands for each BatchNorm (1d, 2d, 3d, synchronised, or a subclass that computes the same).
            `"group_norm"` is `nn.GroupNorm` (Wu and He, 2018, arXiv:1803.08494), which normalises each sample by
            itself: another function, with which the model is to be trained. `"frozen"` is
            `persample.FrozenBatchNorm`, which keeps using the running statistics, also in training mode: what a
            trained model computes in eval mode. Where a subclass calls its child modules behind its batch norm, as
            timm's BatchNormAct2d calls a dropout and an activation, they stand behind the replacement (`norm`) in an
            `nn.Sequential`, under their names.
        groups: number of groups of each GroupNorm. If None, the largest number up to 32 that divides the channels
            and leaves at least 4 of them in each group; one group if there is none.

    Returns:
        The copy and the list of changes.

    Raises:
        OptionError: `groups` does not divide the channels of a BatchNorm, or an option is not known.
        UnsupportedModelError: a BatchNorm cannot be replaced: it is not initialised yet, has another forward or
            parameters of its own, has no running statistics to freeze, or has a single feature, of which GroupNorm
            would make a constant; or the model cannot be copied.

    Example:
        >>> import persample
        >>> from torch import nn
        >>> model, changes = persample.fix(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))
        >>> type(model[1]).__name__, model[1].num_groups, changes[0].paths
        ('GroupNorm', 2, ('1',))
    """
    if batch_norm not in get_args(Replacement):
        known = ", ".join(map(repr, get_args(Replacement)))
        raise OptionError(f"batch_norm={batch_norm!r} is not known: use one of {known}.")
    if groups is not None and batch_norm != "group_norm":
        raise OptionError(f"groups={groups!r} is for batch_norm='group_norm' only: omit it.")
    for module, paths in _batch_norms(model).items():
        _refuse_unknown(module, paths[0])
    fixed = copy_of(model)
    changes = []
    for module, paths in _batch_norms(fixed).items():
        before = repr(module)
        children = children_behind(module) if module._modules else None
        new: nn.Module = _frozen(module, paths[0]) if batch_norm == "frozen" else _group_norm(module, paths[0], groups)
        if children:
            new = _in_a_row(new, {name: getattr(module, name) for name in children}, module.training)
        for path in paths:
            fixed = _put(fixed, path, new)
        changes.append(Change(tuple(paths), before, repr(new)))
    return Fixed(fixed, tuple(changes))


def _batch_norms(model: nn.Module) -> dict[_BatchNorm, list[str]]:
    """Return the BatchNorms that may be in training mode, each with all its paths in the model."""
    paths: dict[_BatchNorm, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, _BatchNorm) and not isinstance(module, FrozenBatchNorm):
            paths.setdefault(module, []).append(path)
    return paths


def _refuse_unknown(module: _BatchNorm, path: str) -> None:
    """Raise if `module` does anything that its replacement would not."""
    name = describe(path, module)
    if isinstance(module, _LazyNormBase):
        raise UnsupportedModelError(f"{name} is not initialised yet: run one forward pass of the model first.")
    if reason := foreign_parameters(module):
        raise UnsupportedModelError(f"{name} {reason}: undo that first, or call .eval() on it.")
    plain = type(module).forward in _KNOWN_FORWARDS and not module._modules
    if "forward" in vars(module) or not (plain or children_behind(module) is not None):
        raise UnsupportedModelError(
            f"{name} has its own forward, which its replacement would lack (only a batch norm followed by calls of "
            "its child modules, such as an activation, is supported): replace it by hand, or call .eval() on it."
        )


def _group_norm(module: _BatchNorm, path: str, groups: int | None) -> nn.GroupNorm:
    channels = module.num_features
    if channels == 1 and isinstance(module, nn.BatchNorm1d):
        raise UnsupportedModelError(
            f"{describe(path, module)} has a single feature, which GroupNorm would turn into a constant: use "
            "batch_norm='frozen', or remove the layer."
        )
    if groups is None:
        most = max(1, min(_MOST_GROUPS, channels // _FEWEST_CHANNELS))
        groups = max(g for g in range(1, most + 1) if channels % g == 0)
    if groups < 1 or channels % groups:
        divisors = ", ".join(str(g) for g in range(1, channels + 1) if channels % g == 0)
        raise OptionError(
            f"groups={groups} does not divide the {channels} channels of {describe(path, module)}: use one of "
            f"{divisors}, or omit it."
        )
    new = nn.GroupNorm(groups, channels, eps=module.eps, affine=module.affine)
    new.weight, new.bias = module.weight, module.bias
    new.training = module.training
    vars(new).update(hooks_of(module))
    return new


def _frozen(module: _BatchNorm, path: str) -> FrozenBatchNorm:
    if module.running_mean is None or module.running_var is None:
        raise UnsupportedModelError(
            f"{describe(path, module)} has no running statistics to freeze (track_running_stats=False): use "
            "batch_norm='group_norm'."
        )
    new = FrozenBatchNorm.__new__(FrozenBatchNorm)
    vars(new).update(vars(module), _modules={})
    return new.train()


def _in_a_row(norm: nn.Module, children: dict[str, nn.Module], training: bool) -> nn.Sequential:
    """Return `norm` followed by `children`, with the hooks of the norm around both."""
    name = "norm"
    while name in children:
        name += "_"
    row = nn.Sequential(OrderedDict({name: norm, **children}))
    row.training = training
    vars(row).update(hooks_of(norm))
    without_hooks(norm)
    return row


def _put(model: nn.Module, path: str, module: nn.Module) -> nn.Module:
    """Return `model` with `module` at `path`."""
    if not path:
        return module
    above, _, name = path.rpartition(".")
    parent = model.get_submodule(above)
    setattr(parent, name, module)
    if name == "_orig_mod":  # of torch.compile: its forward is bound to the module it was made of, until restored
        parent.__setstate__(parent.__getstate__())
    return model
