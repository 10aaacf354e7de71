"""Judging backends on every entry of PyTorch's list of modules."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from persample.testing.candidate import Candidate
from persample.testing.module_sweep.samples import samples


@dataclass(frozen=True)
class Finding:
    """What a backend made of one entry of the list.

    Attributes:
        backend: its name.
        module: the module's name in the list.
        mode: `"train"` or `"eval"`.
        kind: `"exact"`, `"refused"`, `"caught"` (refused by the self-check), `"not applicable"`, or `"wrong"`.
        reason: why, unless it is exact.
    """

    backend: str
    module: str
    mode: str
    kind: str
    reason: str


def sweep(candidates: Sequence[Candidate], most: int = 1000) -> Iterator[Finding]:
    """Yield what each candidate makes of each entry.

    Args:
        candidates: the backends.
        most: at most so many entries of each module in each mode.

    Raises:
        MissingPackageError: the list cannot be imported.
    """
    for sample in samples(most):
        for candidate in candidates:
            if sample.problem is None:
                kind, reason = "not applicable", sample.reason
            else:
                try:
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")
                        verdict = candidate.judge(sample.problem)
                    kind, reason = str(verdict.kind), verdict.reason
                except AssertionError as error:
                    kind, reason = "wrong", str(error)
            yield Finding(candidate.backend, sample.module, sample.mode, kind, reason)
