"""The support tables of the documentation, made by one run of the zoo: `python -m persample.testing.support PAGE`.

The whole table is written to PAGE, twenty rows of it to a short page beside it. The tests of the built-in backends
compare every verdict with it.
"""

from __future__ import annotations

import itertools
import re
import sys
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

import persample
from persample.testing.candidate import Candidate, Verdict
from persample.testing.suite import judge_case
from persample.testing.zoo import FAMILIES, ZOO

#: The built-in backends, as the suite makes them.
BUILT_IN = (
    Candidate("loop"),
    Candidate("fused"),
    Candidate("vmap", {"randomness": "same"}, stream="each"),
    Candidate("hooks"),
    Candidate("opacus"),
    Candidate("backpack"),
)

#: Verdicts by the name of the case and the name of the backend.
Verdicts = Mapping[tuple[str, str], Verdict]

_WORDS = {"exact": "exact", "refused": "refused", "caught": "refused by the self-check"}

#: The rows of the short page.
SHORT = (
    "MLP",
    "Conv2d",
    "Conv2d with groups",
    "ConvTranspose2d",
    "Embedding",
    "LayerNorm",
    "GroupNorm",
    "BatchNorm2d in eval mode",
    "BatchNorm2d in training mode",
    "MultiheadAttention without weights",
    "TransformerEncoderLayer, norm first, batch first, in training mode",
    "LSTM",
    "GRU of packed sequences",
    "Residual convolution",
    "In-place activation behind a convolution",
    "Tied weights",
    "Activation checkpointing",
    "Dropout in training mode",
    "LoRA beside the trained weight",
    "MLP under autocast",
)

_SHORT_INTRODUCTION = """\
# Support in short

Twenty models out of the several hundred of [the full table](support.md), from the same run of `make support`.

- **exact**: gradients, mean and second moment are those of a loop over the samples, to nine digits in float64.
- **refused**: you get an error that gives the reason and the way out. No backend returns a wrong number.

`"vjp"` serves whatever `"loop"` serves. BatchNorm in training mode has no per-sample gradient with any method;
[`persample.fix`](refusals.md#models-with-batchnorm) replaces it. For your own model, ask
[`persample.explain`](howto/choose-a-backend.md).
"""
_INTRODUCTION = """\
# What each backend serves

`make support` writes this page: it runs every backend on every model of the [zoo](howto/own-backend.md#check-it). The
tests compare the backends with it. [The short page](support-in-short.md) has twenty rows of it.

- **exact**: for batches of several sizes, among them a single sample and as many samples as another dimension is
  long, losses, mean gradient, second moment and the gradients of all samples are those of an independent loop over
  the samples, to nine digits in float64.
- **refused**: an error says why, and what to do. Its words are behind the number.

Whatever a backend refuses, `"loop"` serves, but for the last table: there the gradient of a single sample does not
exist.
"""


def verdicts_of(candidates: Iterable[Candidate]) -> Verdicts:
    """Return what each candidate makes of each case of the zoo.

    Raises:
        AssertionError: one is wrong.
    """
    found: dict[tuple[str, str], Verdict] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for candidate, (name, case) in itertools.product(candidates, ZOO.items()):
            try:
                found[name, candidate.backend] = judge_case(candidate, case)
            except Exception as error:
                error.add_note(f"{name!r} by backend {candidate.backend!r}")
                raise
    return found


def page(verdicts: Verdicts) -> str:
    """Return the page, as Markdown."""
    backends = list(dict.fromkeys(backend for _, backend in verdicts))
    notes: dict[str, int] = {}

    def cell(verdict: Verdict) -> str:
        note = f"[^{notes.setdefault(verdict.reason, len(notes) + 1)}]" if verdict.reason else ""
        return _WORDS[verdict.kind] + note

    header = _header(backends)
    possible = [name for name, case in ZOO.items() if not case.impossible]
    counts = [str(sum(verdicts[name, b].kind == "exact" for name in possible)) for b in backends]
    lines = [_INTRODUCTION, *header, _row([f"exact, of {len(possible)}", *counts])]
    for family, cases in FAMILIES.items():
        lines += ["", f"## {family}", "", *header]
        lines += [_row([case.name, *(cell(verdicts[case.name, b]) for b in backends)]) for case in cases]
    lines += ["", "## The refusals", ""]
    lines += [f"[^{number}]: {_quoted(reason)}" for reason, number in notes.items()]
    return "\n".join(lines) + "\n"


def short_page(kinds: Mapping[tuple[str, str], str]) -> str:
    """Return the page with the rows of `SHORT`, as Markdown, from what `read` returns."""
    backends = list(dict.fromkeys(backend for _, backend in kinds))
    rows = [_row([name, *(_WORDS[kinds[name, b]] for b in backends)]) for name in SHORT]
    return "\n".join([_SHORT_INTRODUCTION, *_header(backends), *rows]) + "\n"


def read(text: str) -> dict[tuple[str, str], str]:
    """Return the kinds of the verdicts on a page, by the name of the case and the name of the backend."""
    kinds = {word: kind for kind, word in _WORDS.items()}
    found: dict[tuple[str, str], str] = {}
    backends = [""]
    for line in text.splitlines():
        name, *cells = [re.sub(r"\[\^\d+\]$", "", cell.strip()) for cell in line.strip().strip("|").split(" | ")]
        if line.startswith("|  |"):
            backends = [cell.strip('`"') for cell in cells]
        elif name in ZOO:
            found |= {(name, backend): kinds[cell] for backend, cell in zip(backends, cells, strict=True)}
    return found


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _header(backends: Iterable[str]) -> list[str]:
    cells = ["", *(f'`"{backend}"`' for backend in backends)]
    return [_row(cells), "|---" * len(cells) + "|"]


def _quoted(reason: str) -> str:
    return f"`` {' '.join(reason.split())} ``"


def main(path: Path) -> None:
    """Write the page to `path`, and the short one beside it, as `…-in-short.md`."""
    missing = [c.backend for c in BUILT_IN if not persample.backends()[c.backend].available]
    if missing:
        sys.exit(f"The table needs all backends, and these cannot be imported here: {', '.join(missing)}")
    torch.set_num_threads(1)
    whole = page(verdicts_of(BUILT_IN))
    _write(path, whole)
    _write(short_path(path), short_page(read(whole)))


def short_path(path: Path) -> Path:
    """Return where the short page stands, beside the whole one."""
    return path.with_stem(f"{path.stem}-in-short")


def _write(path: Path, text: str) -> None:
    draft = path.with_suffix(".draft")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
