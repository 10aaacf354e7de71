"""Finding by experiment which sample each entry of an operation's result depends on.

There are two trials. An operation that only moves entries is run on tensors that hold the owner of each entry. All
others are run on the samples with some of them replaced by NaN, which spreads to whatever depends on them: sample i has
a code of m bits, half of them set, and in trial j all samples whose bit j is set are NaN. An entry that depends on one
sample alone is NaN in just the trials of its code; one that depends on several is NaN in more trials, because the
union of two different codes is larger than each; and one that depends on none never is.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from persample.sources.backends.fused.arguments import substitute, tensors_in
from persample.sources.backends.fused.owners import NOBODY

SEVERAL = -2  # the owner of an entry that depends on several samples
ALL = -3  # the owner of an entry that depends on all of them

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Run = Callable[[Arguments], list[Tensor]]

_MARK = 2.0**45  # far from all values that paddings have, and exact in float64 together with any sample's number


def marked(owners: Tensor) -> Tensor:
    """Return sample numbers coded as values that occur nowhere else in a tensor."""
    return owners.double() + _MARK


def unmarked(values: Tensor, batch: int) -> Tensor:
    """Return the numbers of the samples that `marked` wrote, and `NOBODY` for other values."""
    owners = values.double() - _MARK
    return torch.where((owners >= 0) & (owners < batch), owners, NOBODY).long()


def moved(run: Run, arguments: Arguments, labels: Mapping[int, Tensor], indices: set[int]) -> list[Tensor]:
    """Return the results of an operation that only moves entries, on marked labels.

    Args:
        run: the operation; it returns its results.
        arguments: its arguments.
        labels: the marked owners of its operands' entries, by the operand's id; other operands belong to nobody.
        indices: the ids of operands that say where entries go.
    """
    content = [t for t in tensors_in(arguments) if id(t) not in labels and id(t) not in indices]
    others = {id(t): t.detach().to(torch.float64, copy=True) for t in content}
    return run(substitute(arguments, others | dict(labels)))


def on_copies(run: Run, arguments: Arguments) -> list[Tensor]:
    """Return the results of an operation on copies of its arguments, as if it had not run."""
    tensors = {id(t): t.detach() for t in tensors_in(arguments)}
    with _no_random_numbers_drawn(tensors.values()):
        return run(substitute(arguments, {key: t.clone() for key, t in tensors.items()}))


def touched(run: Run, arguments: Arguments, labels: Mapping[int, Tensor], batch: int) -> list[Tensor | None]:
    """Return the owners of the entries of the results of any operation; None for results that cannot hold a NaN.

    Args:
        run: the operation; it returns its results.
        arguments: its arguments.
        labels: whose the entries of its operands are, by the operand's id.
        batch: B.
    """
    tensors = {id(t): t.detach() for t in tensors_in(arguments)}
    # Integers become floating-point numbers only where there is nothing else to hold a NaN.
    holders = [key for key in labels if _holds_nan(tensors[key])] or list(labels)
    codes = _codes(batch)
    half = codes.shape[1] // 2

    def results(hit: Tensor | None) -> list[Tensor]:
        replaced = dict(tensors)
        for key in holders:
            t = tensors[key] if _holds_nan(tensors[key]) else tensors[key].double()
            owner = labels[key]
            if hit is not None:
                where = (owner >= 0) & hit.to(owner.device)[owner.clamp(min=0)]
                t = t.clone().masked_fill_(where, math.nan)  # it lies in memory as before, which `as_strided` goes by
            replaced[key] = t
        return on_copies(run, substitute(arguments, replaced))

    plain = results(None)
    counts = [torch.zeros_like(r, dtype=torch.int64) for r in plain]
    bits = [torch.zeros_like(r, dtype=torch.int64) for r in plain]
    for j in range(codes.shape[1] if any(map(_holds_nan, plain)) else 0):
        for n, (result, before) in enumerate(zip(results(codes[:, j]), plain, strict=True)):
            if _holds_nan(result):
                hits = (result.isnan() & ~before.isnan()).long()
                counts[n] += hits
                bits[n] += hits << j
    found: list[Tensor | None] = []
    for result, count, bit in zip(plain, counts, bits, strict=True):
        owner = torch.where(count > half, SEVERAL, _owners_of_codes(batch).to(bit.device)[bit])
        owner = torch.where(count == codes.shape[1], ALL, owner)
        found.append(torch.where(count == 0, NOBODY, owner) if _holds_nan(result) else None)
    return found


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


@contextmanager
def _no_random_numbers_drawn(tensors: Iterable[Tensor]) -> Iterator[None]:
    devices = {t.device.index for t in tensors if t.is_cuda}
    with torch.random.fork_rng(devices=list(devices)), torch.no_grad():
        yield
