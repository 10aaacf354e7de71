"""An operation whose operands hold samples, and running it on other arguments."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from persample.sources.backends.fused.arguments import substitute, tensors_in
from persample.sources.backends.fused.layout import Layout

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class Unknown(Exception):  # noqa: N818 - no error, but the answer of one way, and the next is tried
    """This method cannot answer the question; try the next one."""


class Call(NamedTuple):
    """An operation.

    Attributes:
        func: the operation.
        args: its positional arguments.
        kwargs: its keyword arguments.
        samples: the layouts of its operands that hold samples, by their id.
        batch: B.
        outputs: what it returned or wrote into; None if it has not run yet.
    """

    func: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    samples: Mapping[int, Layout]
    batch: int
    outputs: list[Tensor] | None = None

    @property
    def arguments(self) -> Arguments:
        """All of its arguments."""
        return self.args, dict(self.kwargs)

    def operands(self) -> list[Tensor]:
        """The operands that hold samples."""
        return [t for t in tensors_in(self.arguments) if id(t) in self.samples]

    def run(self, arguments: Arguments) -> list[Tensor]:
        """Run it on other arguments."""
        args, kwargs = arguments
        return outputs_of(self.func, args, self.func(*args, **kwargs))

    def run_on_copies(self, replacements: Mapping[int, Tensor]) -> list[Tensor]:
        """Run it on copies of its arguments, as if it had not run.

        Args:
            replacements: tensors in place of some of the arguments, by their id.
        """
        tensors = {id(t): replacements.get(id(t), t).detach() for t in tensors_in(self.arguments)}
        with _no_random_numbers_drawn(tensors.values()):
            return self.run(substitute(self.arguments, {key: t.clone() for key, t in tensors.items()}))

    def shapes(self) -> list[torch.Size]:
        """The shapes of the outputs."""
        return [output.shape for output in (self.run_on_copies({}) if self.outputs is None else self.outputs)]


def outputs_of(func: Any, args: tuple[Any, ...], result: Any) -> list[Tensor]:
    """Return the tensors that an operation returned or wrote to."""
    return [args[0]] if func is Tensor.__setitem__ else tensors_in(result)


@contextmanager
def _no_random_numbers_drawn(tensors: Iterable[Tensor]) -> Iterator[None]:
    devices = {t.device.index for t in tensors if t.is_cuda}
    with torch.random.fork_rng(devices=list(devices)), torch.no_grad():
        yield
