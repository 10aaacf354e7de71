"""What the answer for an operation is remembered by."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from persample.sources.backends.fused import op_table
from persample.sources.backends.fused.arguments import tensors_in
from persample.sources.backends.fused.layout import Layout
from persample.sources.backends.fused.propagation.call import Call, Unknown

_SEQUENCES = (tuple, list)


def key_of(call: Call) -> Hashable | None:
    """What the answer depends on, other than values of tensors; None if owners of single rows matter."""
    if any(layout.owners is not None for layout in call.samples.values()):
        return None
    key: list[Any] = [call.func, call.batch, call.outputs and tuple([output.shape for output in call.outputs])]
    try:
        _describe(call.args, call.samples, key)
        if call.kwargs:
            key += call.kwargs
            _describe(call.kwargs.values(), call.samples, key)
        found = tuple(key)
        hash(found)
    except (Unknown, TypeError):  # something cannot be hashed
        return None
    return found


def _describe(items: Iterable[Any], samples: Mapping[int, Layout], key: list[Any]) -> None:
    """Append a description of `items` to `key`; counts encode the nesting."""
    for item in items:
        if isinstance(item, Tensor):
            key += (item.shape, item.dtype, item.device, samples.get(id(item)))
            if item.numel() == 1 and _is_number(item) and id(item) not in samples:
                key.append(item.item())  # PyTorch takes it for a number, such as the width of a padding
        elif isinstance(item, _SEQUENCES):
            key += (_SEQUENCES, len(item))
            _describe(item, samples, key)
        elif isinstance(item, dict):
            key += (dict, len(item), *item)
            _describe(item.values(), samples, key)
        elif isinstance(item, slice):
            ends = (item.start, item.stop, item.step)
            if any(isinstance(end, Tensor) for end in ends):
                raise Unknown
            key += (slice, *ends)
        else:
            key += (type(item), item)


def _is_number(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not (tensor.is_floating_point() or tensor.is_complex())


def may_decide(call: Call, tensor: Tensor) -> bool:
    """Whether a tensor holds integers (a mask, positions), or has entries that are left out."""
    real = tensor.is_floating_point() or tensor.is_complex()
    return not real or tensor.layout is not torch.strided or call.func in op_table.POSITIONS


def fingerprint_of(call: Call) -> bytes:
    """Return a fingerprint of the values of constants that may decide where entries go."""
    found = hashlib.blake2b(digest_size=16)
    for tensor in tensors_in(call.arguments):
        if id(tensor) not in call.samples and may_decide(call, tensor):
            found.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return found.digest()
