"""The outputs of a model under draws of its weights: several draws in one pass where possible, else one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, Protocol, TypeAlias, TypedDict

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from persample.dtypes import at_least_float32
from persample.errors import OptionError, UsageError
from persample.sources.batch import arguments, split_batch
from persample.sources.model.calling import forward_exists
from persample.sources.model.state import State, state_restored
from persample.sources.selfcheck.tolerances import tolerance
from persample.sources.splits.tree import plain
from persample.vogn.sampling import draw, restored
from persample.vogn.settings import require_count, require_generator

Weights: TypeAlias = dict[str, Tensor]
Forward: TypeAlias = Callable[[Weights], Tensor]


class Gaussian(Protocol):
    """A diagonal Gaussian over the weights; mean μ and standard deviation σ by parameter name."""

    @property
    def mean(self) -> Mapping[str, Tensor]: ...

    @property
    def scale(self) -> Mapping[str, Tensor]: ...


# A gibibyte of float32 in one pass; with more, an accelerator has enough to do in any case.
_MOST_WEIGHTS = 2**28


class DrawOptions(TypedDict, total=False):
    """How to draw from a posterior, for everything that averages over it.

    Attributes:
        samples: K, the number of draws; 32 if left out.
        generator: source of the noise; None is PyTorch's global generator, or the optimizer's own if an optimizer
            is asked (whose later draws then differ from those of a run without this call).
        draws_at_once: number of draws per pass of the model, by `torch.func.vmap`; memory grows with it. None
            takes them one by one on a CPU, which is faster there but for single inputs, and up to a gibibyte of
            weights elsewhere. Where vmap cannot run the model, they go one by one. The draws are the same anyway.
        rows_at_once: number of samples per pass of the model; None takes all. All samples meet the same draws.
        pick: takes the tensor that matters out of what the model returns, for example
            `lambda output: output.last_hidden_state`; None if that is a tensor already, or called `.logits`.
    """

    samples: int
    generator: torch.Generator | None
    draws_at_once: int | None
    rows_at_once: int | None
    pick: Callable[[Any], Tensor] | None


@torch.no_grad()
def for_each_draw(
    model: nn.Module,
    posterior: Gaussian,
    inputs: Any,
    consume: Callable[[Tensor], None],
    *,
    samples: int = 32,
    generator: torch.Generator | None = None,
    draws_at_once: int | None = None,
    rows_at_once: int | None = None,
    pick: Callable[[Any], Tensor] | None = None,
) -> None:
    """Pass the outputs of `model` under each draw of its weights to `consume`.

    Afterwards the model has the weights that it had, bit for bit, whatever happens. The first draw goes through an
    ordinary forward pass. Others go through `torch.func.vmap` only if it gives the same for the first one, which it
    does not with dropout, or with weights that the model reaches past its modules.

    Args:
        model: the network; it stays in the mode it is in. Parameters that the posterior lacks keep their values.
        posterior: what to draw from.
        inputs: what the model takes: a tensor, a tuple of positional arguments, or a dict of keyword arguments. Dim 0
            is the sample.
        consume: takes the outputs of some draws, shape `(k, B, …)`, in at least float32; the k add up to `samples`.
        samples: see `DrawOptions`, as for those that follow.
        generator: see `DrawOptions`.
        draws_at_once: see `DrawOptions`.
        rows_at_once: see `DrawOptions`.
        pick: see `DrawOptions`.

    Raises:
        OptionError: a number is below 1, or the posterior is not one of this model.
        UsageError: the model, or `pick`, returns something else than a tensor of floating-point numbers.
        BatchError: `inputs` is of another type.
    """
    require_count("samples", samples)
    require_generator("generator", generator)
    params = _params(model, posterior.mean)
    forward = _forward(model, inputs, rows_at_once, pick)
    at_once = _affordable(params) if draws_at_once is None else require_count("draws_at_once", draws_at_once)
    draws = _draws(posterior, params, samples, generator)
    first = next(draws)
    outputs: list[Tensor] = []
    _one_by_one(forward, params, [first], outputs.append)
    consume(outputs[0])
    if samples > 1 and at_once > 1 and _can_map(model, forward, first, outputs[0]):
        while chunk := list(islice(draws, at_once)):
            _at_once(model, forward, chunk, consume)
    else:
        _one_by_one(forward, params, draws, consume)


def _params(model: nn.Module, mean: Mapping[str, Tensor]) -> Weights:
    """The parameters of `model` that are drawn, by name."""
    own = dict(model.named_parameters())
    for name, value in mean.items():
        if name not in own or own[name].shape != value.shape:
            there = f"has shape {tuple(own[name].shape)}" if name in own else "is missing"
            raise OptionError(
                f"The posterior has {name!r} of shape {tuple(value.shape)}, which in this model {there}: it belongs "
                "to another model."
            )
    return {name: own[name] for name in mean}


def _forward(model: nn.Module, inputs: Any, rows_at_once: int | None, pick: Callable[[Any], Tensor] | None) -> Forward:
    """A function from weights, by name, to the outputs; other weights are the model's."""
    args, kwargs = arguments(inputs, model)
    batches = [plain((args, kwargs))]
    if rows_at_once is not None:
        size = require_count("rows_at_once", rows_at_once)
        batch = split_batch(args, kwargs, None, for_gradients=False)
        parts = [batch.take(slice(start, start + size)) for start in range(0, batch.size, size)]
        batches = [(part.args, part.kwargs) for part in parts or [batch]]

    def forward(weights: Weights) -> Tensor:
        with forward_exists():
            parts = [functional_call(model, weights, a, k) if weights else model(*a, **k) for a, k in batches]
        parts = [getattr(part, "logits", part) if pick is None else pick(part) for part in parts]
        for part in parts:
            if not isinstance(part, Tensor) or not part.is_floating_point():
                raise UsageError(
                    f"The model returned {part.dtype if isinstance(part, Tensor) else type(part).__name__}, but "
                    "predictions need one tensor of floating-point numbers: take it out with "
                    "pick=lambda output: output.logits, or average what you need over several "
                    "`with optimizer.sampled_params():` blocks."
                )
        outputs = torch.cat(parts) if len(parts) > 1 else parts[0]
        return at_least_float32(outputs)

    return forward


def _draws(posterior: Gaussian, params: Weights, samples: int, generator: torch.Generator | None) -> Iterator[Weights]:
    """Draw after draw, each with dtypes and devices of `params`."""
    scale = posterior.scale
    for _ in range(samples):
        drawn = draw(list(posterior.mean.values()), [scale[name] for name in posterior.mean], generator)
        yield {name: w.to(params[name]) for name, w in zip(posterior.mean, drawn, strict=True)}


def _affordable(params: Weights) -> int:
    """Number of draws for one pass; on a CPU one, see `benchmarks/draws.py`."""
    if all(p.device.type == "cpu" for p in params.values()):
        return 1
    return max(1, _MOST_WEIGHTS // max(1, sum(p.numel() for p in params.values())))


def _one_by_one(forward: Forward, params: Weights, draws: Iterable[Weights], consume: Callable[[Tensor], None]) -> None:
    """Write each draw into the model, and restore its own weights at the end."""
    with restored(list(params.values())):
        for weights in draws:
            torch._foreach_copy_(list(params.values()), list(weights.values()))
            consume(forward({}).unsqueeze(0))


def _can_map(model: nn.Module, forward: Forward, weights: Weights, outputs: Tensor) -> bool:
    """Whether `_mapped` reproduces `outputs` for `weights`; tried twice, because some can be mapped only once."""
    try:
        mapped = _mapped(model, forward, [weights, weights])
    except (RuntimeError, TypeError, ValueError, IndexError):  # whatever torch.func cannot run, or memory not hold
        return False
    if mapped.shape[1:] != outputs.shape[1:] or not mapped.numel():
        return False
    return bool((mapped - outputs).abs().max() <= tolerance(outputs) * outputs.abs().max())


def _at_once(model: nn.Module, forward: Forward, chunk: list[Weights], consume: Callable[[Tensor], None]) -> None:
    """All draws of the chunk in one pass, or in two if memory does not hold it."""
    try:
        outputs = _mapped(model, forward, chunk)
    except torch.OutOfMemoryError:
        if len(chunk) == 1:
            raise
        for part in (chunk[: len(chunk) // 2], chunk[len(chunk) // 2 :]):
            _at_once(model, forward, part, consume)
        return
    consume(outputs)


def _mapped(model: nn.Module, forward: Forward, chunk: list[Weights]) -> Tensor:
    stacked = {name: torch.stack([weights[name] for weights in chunk]) for name in chunk[0]}
    with state_restored(State(model)):
        outputs: Tensor = vmap(forward)(stacked)
    return outputs
