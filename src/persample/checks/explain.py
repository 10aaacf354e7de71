"""`explain`: what would serve each parameter of a model, found before anything is computed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from persample.checks.outputs_loss import weighted_sum_of_outputs
from persample.sources.batch import as_batch
from persample.sources.model.refusals import describe, impossible_modules
from persample.sources.model.usage import Use
from persample.sources.registry import make_source, name_with

Status = Literal["served", "depends", "unused", "frozen", "refused"]


@dataclass(frozen=True)
class ExplainedParameter:
    """What would serve one parameter.

    Attributes:
        name: its name in the model.
        other_names: further names of the same parameter, if it is tied.
        shape: its shape.
        module: the module that holds it, its class and its path.
        status: `"served"`: exactly, by all its uses. `"refused"`: `moments` and `per_sample` would raise.
            `"unused"`: the example batch does not reach it, so its gradients are zero. `"frozen"`: it requires no
            gradient and has no entry in the results. `"depends"`: a rule is there, but only an example batch can
            tell whether it holds for the way in which the model uses the parameter.
        uses: its uses in the forward pass, in order; without an example batch, the rule of its module.
        norms: what would give the norms of its gradients, with an example batch, for the backends that have a rule of
            another package for them: that rule, or what stands in for it, and why.
    """

    name: str
    other_names: tuple[str, ...]
    shape: tuple[int, ...]
    module: str
    status: Status
    uses: tuple[Use, ...]
    norms: str = ""

    @property
    def how(self) -> str:
        """What serves it: layers or operations with their paths, equal ones counted; and what gives the norms."""
        counts = Counter((use.by, use.kind, use.module) for use in self.uses)
        found = [
            by + (" (fallback)" if kind == "fallback" else "") + (f" in {module!r}" if module else "") + _times(count)
            for (by, kind, module), count in counts.items()
        ]
        return "; ".join([*found, *([f"norms by {self.norms.split(':')[0]}"] if self.norms else [])])

    @property
    def why(self) -> str:
        """Why it is refused, and what to do."""
        return " ".join(dict.fromkeys(use.why for use in self.uses if use.why))


@dataclass(frozen=True)
class Explanation:
    """What `explain` returns: it prints as a table.

    Attributes:
        backend: the backend's name.
        rows: every parameter, in the model's order.
        refusals: why the model is refused as a whole, whatever serves its parameters.
        samples: the size of the example batch; 0 without one.
        machinery: which of its machineries would serve the model, for a backend that has several; of `fused` with
            `compile=True`, whether the step is `"replayed"` or `"eager"`.
        machinery_because: why not the other.
    """

    backend: str
    rows: tuple[ExplainedParameter, ...]
    refusals: tuple[str, ...]
    samples: int
    machinery: str | None = None
    machinery_because: str = ""

    @property
    def supported(self) -> bool | None:
        """Whether the backend serves the model; None if only an example batch can tell."""
        if self.refusals or any(row.status == "refused" for row in self.rows):
            return False
        return True if self.samples else None

    @property
    def verdict(self) -> str:
        """The same as a sentence."""
        name = name_with(self.backend, self.machinery)
        if self.supported is None:
            return f"backend {name!r} may serve this model: pass an example batch to find out"
        return f"backend {name!r} {'serves' if self.supported else 'refuses'} this model"

    def __str__(self) -> str:
        lines = [self.verdict, *(f"  {line}" for line in self._notes())]
        width = max((len(row.name) for row in self.rows), default=0)
        for row, why in zip(self.rows, self._reasons(), strict=True):
            lines.append(f"  {row.name:<{width}}  {row.status:<7}  {row.how}".rstrip())
            if why:
                lines.append(f"  {'':<{width}}           {why}")
        return "\n".join(lines)

    def __rich__(self) -> Any:
        """Return it as a table for rich."""
        from rich.markup import escape
        from rich.table import Table

        title, caption = escape(self.verdict), escape("\n".join(self._notes()))
        table = Table("parameter", "shape", "module", "", "by", title=title, caption=caption)
        for row, why in zip(self.rows, self._reasons(), strict=True):
            shape, how = "×".join(map(str, row.shape)), f"{row.how}: {why}" if why else row.how
            table.add_row(*map(escape, (row.name, shape, row.module, row.status, how)))
        return table

    def _notes(self) -> list[str]:
        because = [f"{self.machinery}, because: {self.machinery_because}"] if self.machinery_because else []
        return [*because, *(f"the model: {reason}" for reason in self.refusals)]

    def _reasons(self) -> list[str]:
        """Why each row is refused; empty if the row above has the same reason."""
        above = ["", *(row.why for row in self.rows)]
        return ["" if row.why == before else row.why for row, before in zip(self.rows, above, strict=False)]


def explain(
    model: nn.Module,
    inputs: Any = None,
    targets: Any = None,
    loss_fn: Callable[[Any, Any], Any] | None = None,
    *,
    backend: str = "fused",
    **options: Any,
) -> Explanation:
    """Report, before anything is computed, what would serve each parameter of `model`: a rule, a fallback, or nothing.

    Without a batch it goes by the modules. With an example batch it runs the forward pass once (and a few times more to
    see whether the model mixes the samples), but no backward pass, and tells each use of each parameter. Of that
    nothing remains: neither on the model nor in the random numbers. Backends that cannot tell by the forward pass alone
    (`vmap`, `loop`, the machineries of `backpack` and `opacus`) try two samples. With `compile=True`, `fused` records
    the step, too, to say whether it can be replayed.

    Args:
        model: the network; it is not changed.
        inputs: an example batch, as for `PerSampleGradSource.moments`, better of three samples than of one; or None.
        targets: its targets, if `loss_fn` needs them.
        loss_fn: the loss of each sample. If None, a weighted sum of all outputs whose dim 0 is the sample stands for
            it.
        backend: the backend in question.
        **options: its options.

    Raises:
        BatchError: inputs and targets are not a mini-batch.
        LossError: the loss is not a finite vector with an entry for each sample, or no loss is given and no output has
            dim 0 for the samples.
        UnknownBackendError, MissingPackageError, OptionError: as `make_source`.

    Example:
        >>> import torch, persample
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.PReLU())
        >>> print(persample.explain(model, torch.randn(4, 3), backend="fused"))
        backend 'fused' serves this model
          0.weight  served   linear in '0'
          0.bias    served   linear in '0'
          1.weight  served   prelu → mul in '1'
    """
    source = make_source(backend, model, loss_fn or weighted_sum_of_outputs(), check="never", **options)
    impossible = dict(impossible_modules(model))
    samples = as_batch(inputs, targets, model).size if inputs is not None else 0
    seen = inputs is not None and not impossible
    if loss_fn is None:
        targets = torch.arange(samples)
    uses = source.uses(inputs, targets) if seen else source.uses()
    refusals = dict.fromkeys([*impossible.values(), *(use.why for use in uses if use.parameter is None)])
    rows = tuple(_rows(model, uses, impossible, source.norms_by, complete=seen and not refusals))
    return Explanation(backend, rows, tuple(refusals), samples if seen else 0, source.ran, source.ran_because)


def _rows(
    model: nn.Module,
    uses: Iterable[Use],
    impossible: Mapping[str, str],
    norms_by: Mapping[str, str],
    *,
    complete: bool,
) -> Iterator[ExplainedParameter]:
    """Yield the parameters; `complete` says whether `uses` are all uses."""
    modules = dict(model.named_modules(remove_duplicate=False))
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    for parameter, (name, *others) in names.items():
        paths = [n.rpartition(".")[0] for n in (name, *others)]
        own = [Use(name, "refused", "the model", path, impossible[path]) for path in paths if path in impossible]
        own = own or [use for use in uses if use.parameter == name]
        yield ExplainedParameter(
            name,
            tuple(others),
            () if is_lazy(parameter) else tuple(parameter.shape),
            describe(paths[0], modules[paths[0]]),
            _status(parameter, own, complete),
            tuple(own) if parameter.requires_grad else (),
            norms_by.get(name, ""),
        )


def _status(parameter: nn.Parameter, uses: list[Use], complete: bool) -> Status:
    if not parameter.requires_grad:
        return "frozen"
    if any(use.kind == "refused" for use in uses):
        return "refused"
    if not complete:
        return "depends"
    return "served" if uses else "unused"


def _times(count: int) -> str:
    return f" ×{count}" if count > 1 else ""
