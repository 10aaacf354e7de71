"""Backend `"vjp"`: vector-Jacobian products of the model's own graph, several samples at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from persample.errors import DisagreementError
from persample.moments import Moments
from persample.sources.backends.chunks import Chunk, moments_of_chunks, per_sample_of_chunks, refuse_chunk_size
from persample.sources.backends.vjp_products import batched_grad
from persample.sources.batch import Batch
from persample.sources.contract import Check
from persample.sources.model.random_state import random_state, random_state_restored
from persample.sources.selfcheck.oracle import (
    gradient,
    other_leaves,
    part_gradients,
    reentrant_refused,
    refuse_accumulated,
    sample_gradients,
)
from persample.sources.selfcheck.tolerances import Allowance
from persample.sources.selfcheck.verify import require_close
from persample.sources.source import PerSampleGradSource

Result = TypeVar("Result")
_PutTogether = Callable[[Iterable[Chunk], Mapping[str, nn.Parameter], int], Result]


class VjpSource(PerSampleGradSource):
    """The gradients of c samples as the rows of one Jacobian: c vector-Jacobian products at once.

    Model and loss run as they are, so whatever `"loop"` serves is served here: derivatives inside of the model, control
    flow that depends on values, recurrent layers, hooks. The backward pass alone is mapped, by `torch.func.vmap`, and a
    sum of what it gives is compared with an ordinary backward pass, each time. Where it cannot be mapped (custom
    functions with kernels of their own, sparse gradients), or that comes out wrong, each sample goes alone through the
    model, as with `"loop"`.

    The products of c samples go through the graph of c samples, so the arithmetic of the backward pass grows with c,
    and the overhead of autograd falls with it: small models gain from large chunks, large models lose.

    Args:
        model: the network.
        loss_fn: the loss of each sample.
        check: when the self-check runs.
        chunk_size: c, the number of samples per chunk. Memory is that of c backward passes of c samples each. None
            takes the whole batch.

    Raises:
        OptionError: `chunk_size` is not a positive integer or None.
    """

    method: ClassVar[str] = "vector-Jacobian products of some samples at once"

    runs_parameter_hooks: ClassVar[bool] = True

    ordinary_state = True

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Any, Any], Any],
        *,
        check: Check = "first",
        chunk_size: int | None = 8,
    ) -> None:
        super().__init__(model, loss_fn, check=check)
        refuse_chunk_size(chunk_size)
        self.chunk_size = chunk_size

    def compute_per_sample(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return self._compute(batch, per_sample_of_chunks)

    def compute_moments(self, batch: Batch) -> Moments:
        return self._compute(batch, moments_of_chunks)

    def _compute(self, batch: Batch, put_together: _PutTogether[Result]) -> Result:
        before, state = random_state(self.model), self.state()
        try:
            return self._at_once(batch, put_together)
        except (_UnmappedError, DisagreementError):
            state.put_back()
        with random_state_restored(self.model, before):
            losses, rows = sample_gradients(self, batch, range(batch.size))
            losses = losses.detach()
            chunks = ((losses[i : i + 1], _as_rows(row)) for i, row in enumerate(rows))
            return put_together(chunks, self.parameters(), batch.size)

    def _at_once(self, batch: Batch, put_together: _PutTogether[Result]) -> Result:
        """Return `put_together` of the chunks of `batch`; each chunk is one mapped backward pass.

        A sum of the rows, with random weights, must be the ordinary gradient of that sum of the losses. It is not
        where PyTorch's rule for mapping an operation is wrong (that of `torch.cdist` is, in 2.13), or where a hook
        makes something else of a gradient than a linear function.

        Raises:
            _UnmappedError: a backward pass cannot be mapped.
            DisagreementError: the sum is another one.
        """
        size = self.chunk_size or batch.size
        parts = [list(range(start, min(start + size, batch.size))) for start in range(0, batch.size, size)]
        losses, chunks = part_gradients(self, batch, parts, self._rows)
        weights = 0.5 + torch.rand(batch.size, device="cpu", generator=torch.Generator().manual_seed(0)).to(losses)
        expected = gradient((weights * losses).sum(), self)
        allowance = Allowance.of(losses)
        losses = losses.detach()
        sums = {name: torch.zeros_like(g) for name, g in expected.items()}

        def added_up() -> Iterator[Chunk]:
            for part, rows in zip(parts, chunks, strict=True):
                for name in sums:
                    sums[name] += torch.einsum("b,b...->...", weights[part].to(rows[name].dtype), rows[name])
                yield losses[part], rows

        result = put_together(added_up(), self.parameters(), batch.size)
        require_close(self, "weighted sum", sums, expected, allowance, batch.size)
        return result

    def _rows(self, losses: Tensor) -> dict[str, Tensor]:
        """Return ∇ℓ_i for each entry of `losses` by one mapped backward pass.

        Raises:
            _UnmappedError: it cannot be mapped.
        """
        if len(losses) == 1:
            return _as_rows(gradient(losses[0], self))
        parameters = self.parameters()
        if not parameters or not losses.requires_grad:
            return {name: p.new_zeros((len(losses), *p.shape)) for name, p in parameters.items()}
        wanted = list(parameters.values())
        targets = wanted + other_leaves(losses, wanted)
        unit_vectors = torch.eye(len(losses), dtype=losses.dtype, device=losses.device)
        try:
            with reentrant_refused():
                found = batched_grad(losses, targets, unit_vectors, retain_graph=True, allow_unused=True)
        except torch.OutOfMemoryError:
            raise
        except _ERRORS as error:  # one of the user's own comes again, one by one
            raise _UnmappedError from error
        refuse_accumulated(parameters)
        return {
            name: p.new_zeros((len(losses), *p.shape)) if g is None else g
            for (name, p), g in zip(parameters.items(), found, strict=False)
        }


def _as_rows(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the gradients of one sample as those of a chunk."""
    return {name: g.unsqueeze(0) for name, g in gradients.items()}


class _UnmappedError(Exception):
    """The backward pass of some samples at once failed."""


#: What comes of a backward pass that `torch.func` cannot map, be it PyTorch's or the user's own.
_ERRORS = (RuntimeError, ValueError, TypeError, IndexError, AttributeError, AssertionError)
