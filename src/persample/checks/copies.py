"""Copies of modules."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import nn

from persample.errors import UnsupportedModelError
from persample.sources.model.refusals import describe

Module = TypeVar("Module", bound=nn.Module)


def copy_of(module: Module) -> Module:
    """Return a deep copy of `module`.

    Raises:
        UnsupportedModelError: it holds something that cannot be copied.
    """
    try:
        return copy.deepcopy(module)
    except (RuntimeError, TypeError) as error:
        raise UnsupportedModelError(
            f"{describe('', module)} cannot be copied ({str(error).splitlines()[0]}). If it keeps tensors computed "
            "from its parameters, as torch.nn.utils.weight_norm and torch.nn.utils.prune do after the first forward "
            "pass: call this before any forward pass, or use torch.nn.utils.parametrizations."
        ) from error
