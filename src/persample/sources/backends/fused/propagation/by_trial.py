"""Any operation, run with samples replaced by NaN, which spreads to whatever depends on them.

Sample i has a code of m bits, half of them set, and in trial j all samples whose bit j is set are NaN. An entry that
depends on one sample alone is NaN in just the trials of its code; one that depends on several is NaN in more trials,
because the union of two different codes is larger than each; and one that depends on none never is.

A kernel that is not PyTorch's own may take a NaN for an address, and end the process. There samples are replaced by
numbers near their own, and whatever is another number than before depends on them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from persample.sources.backends.fused import op_table
from persample.sources.backends.fused.arguments import tensors_in
from persample.sources.backends.fused.owners import ALL, NOBODY, SEVERAL
from persample.sources.backends.fused.propagation.call import Call, Unknown
from persample.sources.backends.fused.propagation.labels import labels_of, where_of
from persample.sources.backends.fused.propagation.lost import NO_TRACE, Lost, Where

_BY_MEMORY = op_table.functions("as_strided")
_BETWEEN_ENTRIES = Lost("as_strided may read memory outside the tensor: call .contiguous() first", mixed=True)


def by_trial(call: Call) -> list[Where]:
    """Return the same by trial."""
    if call.func in _BY_MEMORY and any(torch.empty_like(t).stride() != t.stride() for t in call.operands()):
        return [_BETWEEN_ENTRIES for _ in call.shapes()]
    try:
        owners = _touched(call, labels_of(call))
    except (RuntimeError, ValueError, IndexError, TypeError, NotImplementedError) as error:
        if call.func in _BY_MEMORY:
            return [_BETWEEN_ENTRIES for _ in call.shapes()]
        raise Unknown from error
    # Indices that come with values (topk, max) belong to the samples of the values.
    by_shape = {owner.shape: owner for owner in owners if owner is not None}
    return [where_of(call, by_shape[shape]) if shape in by_shape else NO_TRACE for shape in call.shapes()]


def _touched(call: Call, labels: Mapping[int, Tensor]) -> list[Tensor | None]:
    """Return the owners of the entries of the results of any operation; None for results that cannot hold a NaN.

    Args:
        call: the operation.
        labels: whose the entries of its operands are, by the operand's id.
    """
    tensors = {id(t): t.detach() for t in tensors_in(call.arguments)}
    # Integers become floating-point numbers only where there is nothing else to hold a NaN.
    holders = [key for key in labels if _holds_nan(tensors[key])] or list(labels)
    codes = _codes(call.batch)
    half = codes.shape[1] // 2
    foreign = _is_foreign(call.func)

    def results(hit: Tensor | None) -> list[Tensor]:
        replaced = {}
        for key in holders:
            t = tensors[key] if _holds_nan(tensors[key]) else tensors[key].double()
            owner = labels[key]
            if hit is not None:
                where = (owner >= 0) & hit.to(owner.device)[owner.clamp(min=0)]
                other = _near(t) if foreign else torch.full_like(t, math.nan)
                t = torch.where(where, other, t, out=t.clone())  # in memory as before, which `as_strided` goes by
            replaced[key] = t
        return call.run_on_copies(replaced)

    plain = results(None)
    counts = [torch.zeros_like(r, dtype=torch.int64) for r in plain]
    bits = [torch.zeros_like(r, dtype=torch.int64) for r in plain]
    for j in range(codes.shape[1] if any(map(_holds_nan, plain)) else 0):
        for n, (result, before) in enumerate(zip(results(codes[:, j]), plain, strict=True)):
            if _holds_nan(result):
                is_hit = result != before if foreign else result.isnan()
                hits = (is_hit & ~before.isnan()).long()
                counts[n] += hits
                bits[n] += hits << j
    found: list[Tensor | None] = []
    for result, count, bit in zip(plain, counts, bits, strict=True):
        owner = torch.where(count > half, SEVERAL, _owners_of_codes(call.batch).to(bit.device)[bit])
        owner = torch.where(count == codes.shape[1], ALL, owner)
        found.append(torch.where(count == 0, NOBODY, owner) if _holds_nan(result) else None)
    return found


def _is_foreign(func: Any) -> bool:
    """Whether an operation comes from a library of operators other than PyTorch's, as those of torchvision do."""
    if isinstance(func, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        return str(func).partition(".")[0] not in ("aten", "prims")
    return False


def _near(t: Tensor) -> Tensor:
    """Return numbers that each are a little larger than those of `t`, by other shares, or a little above zero."""
    shares = torch.arange(t.numel(), device=t.device).remainder(61).add(61).view(t.shape) / (61 * 128)
    return t + torch.where(t == 0, 1, t) * shares.to(t.dtype)


def _holds_nan(t: Tensor) -> bool:
    return t.is_floating_point() or t.is_complex()


@cache
def _codes(batch: int) -> Tensor:
    """Return the codes of the samples, shape `(B, m)`, each with m // 2 bits set."""
    m = next(m for m in itertools.count(2) if math.comb(m, m // 2) >= batch)
    codes = torch.zeros(batch, m, dtype=torch.bool, device="cpu")
    for i, bits in enumerate(itertools.islice(itertools.combinations(range(m), m // 2), batch)):
        codes[i, list(bits)] = True
    return codes


@cache
def _owners_of_codes(batch: int) -> Tensor:
    """Return the sample that each code belongs to, by its bits; `SEVERAL` for invalid codes."""
    codes = _codes(batch)
    owners = torch.full((2 ** codes.shape[1],), SEVERAL, device="cpu")
    numbers = torch.arange(max(batch, codes.shape[1]), device="cpu")
    owners[(codes.long() << numbers[: codes.shape[1]]).sum(1)] = numbers[:batch]
    return owners
