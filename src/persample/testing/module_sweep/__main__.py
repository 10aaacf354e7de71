"""Print how many entries of PyTorch's list of modules each backend serves or refuses, and whether one is wrong."""

from __future__ import annotations

import sys
from collections import Counter

import torch

from persample.testing.module_sweep.sweep import sweep
from persample.testing.support import BUILT_IN

_ORDER = ("wrong", "caught", "refused", "not applicable")


def main(names: list[str]) -> int:
    """Run the list through the backends of these names, and return 1 if one of them is wrong anywhere."""
    unknown = set(names) - {c.backend for c in BUILT_IN}
    if unknown:
        print(f"There is no built-in backend {', '.join(map(repr, sorted(unknown)))}.", file=sys.stderr)
        return 2
    candidates = [c for c in BUILT_IN if c.backend in (names or ("fused", "hooks"))]
    findings = Counter((f.backend, f.kind, f"{f.module} in {f.mode} mode: {f.reason}") for f in sweep(candidates))
    for candidate in candidates:
        own = {(kind, text): number for (b, kind, text), number in findings.items() if b == candidate.backend}
        for shown in _ORDER:
            for (kind, text), number in own.items():
                if kind == shown:
                    print(f"{candidate.backend}, {kind}, {number} of {text}")
    print()
    for candidate in candidates:
        totals: Counter[str] = Counter()
        for (backend, kind, _), number in findings.items():
            totals[kind] += number if backend == candidate.backend else 0
        print(f"{candidate.backend}: " + ", ".join(f"{totals[kind]} {kind}" for kind in ("exact", *_ORDER)))
    return 1 if any(kind == "wrong" for _, kind, _ in findings) else 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(sys.argv[1:]))
