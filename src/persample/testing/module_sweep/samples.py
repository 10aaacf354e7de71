"""The entries of PyTorch's list of modules as problems, or the reason why an entry is none."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from persample.errors import MissingPackageError
from persample.testing.devices import set_seed
from persample.testing.module_sweep.arrangement import Arrangement, Call, DoesNotFitError, MixesError, arrange
from persample.testing.problem import Problem
from persample.testing.zoo.case import robust


@dataclass(frozen=True)
class Sample:
    """One entry of the list in one mode.

    Attributes:
        module: its name in the list.
        mode: `"train"` or `"eval"`.
        problem: what backends are asked, or None if the entry is not applicable.
        reason: why it is not.
    """

    module: str
    mode: str
    problem: Problem | None
    reason: str = ""


class Swept(nn.Module):
    """A module behind linear layers that change nothing, so that gradients flow through those without parameters.

    Args:
        module: the module.
        arrangement: how it is called.
        behind: which arguments go through a linear layer before.
    """

    def __init__(self, module: nn.Module, arrangement: Arrangement, behind: Sequence[int]) -> None:
        super().__init__()
        self.module = module
        self.arrangement = arrangement
        self.before = nn.ModuleDict({str(n): _identity(arrangement.batch[n]) for n in behind})

    def forward(self, *batch: Tensor) -> Tensor:
        """Return all results, one row for each sample."""
        given = [self.before[str(n)](x) if str(n) in self.before else x for n, x in enumerate(batch)]
        return self.arrangement.outputs(self.module, given)


def samples(most: int = 1000) -> Iterator[Sample]:
    """Yield the entries of the list in training and in eval mode, at most so many of each module in each mode."""
    try:
        # Importing PyTorch's own test tools freezes the flags of its backends, of the whole process.
        with torch.backends.__allow_nonbracketed_mutation():
            from torch.testing._internal.common_modules import module_db
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            f'PyTorch\'s list of modules cannot be used here ({error}); run: pip install "persample[testing]"'
        ) from error

    for info in module_db:
        for training in (True, False):
            set_seed(0)
            inputs = info.module_inputs_func(
                info, device="cpu", dtype=torch.float64, requires_grad=False, training=training
            )
            for given in inputs[:: math.ceil(len(inputs) / most)]:
                arguments = given.constructor_input
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    module = info.module_cls(*arguments.args, **arguments.kwargs).double().train(training)
                yield _sample(info.name, module, given.forward_input)


def _sample(name: str, module: nn.Module, given: Any) -> Sample:
    mode = "train" if module.training else "eval"
    if given is None:
        return Sample(name, mode, None, "the list has no call of it")
    call = Call(given.args, given.kwargs)
    try:
        if isinstance(module, nn.modules.loss._Loss) and module.reduction != "none":
            return Sample(name, mode, _loss_problem(module, call))
        return Sample(name, mode, _module_problem(module, call))
    except DoesNotFitError as error:
        return Sample(name, mode, None, str(error))


def _module_problem(module: nn.Module, call: Call) -> Problem:
    with torch.no_grad():
        call(module, call.tensors)  # lazy modules get their parameters
    for parameter in module.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    try:
        arrangement, mixes = arrange(module, call), False
    except MixesError:
        arrangement, mixes = Arrangement(call, tuple(call.tensors), (0,) * len(call.tensors), (0,)), True
    floating = [n for n, x in enumerate(arrangement.batch) if x.is_floating_point() and x.dim() > 1]
    behind = floating[:1] if isinstance(module, nn.modules.loss._Loss) else floating
    model = Swept(module, arrangement, behind).double()
    with torch.no_grad():
        outputs = copy.deepcopy(model)(*arrangement.batch)
    if not torch.isfinite(outputs).all():
        raise DoesNotFitError("its result is not finite")
    return Problem(model, arrangement.batch, torch.randn_like(outputs), robust, impossible=mixes)


def _loss_problem(module: nn.Module, call: Call) -> Problem:
    """A reduced loss is not a model but a loss: that of a linear layer which changes nothing."""
    if len(call.tensors) != 2:
        raise DoesNotFitError("it is a loss of other arguments than outputs and targets, and reduces the batch")
    outputs, targets = call.tensors
    if outputs.dim() < 2 or not len(targets) == len(outputs):
        raise DoesNotFitError("it is a loss, called without a batch")
    summing: Any = copy.deepcopy(module)
    summing.reduction = "sum"

    def sums(outputs: Tensor, targets: Tensor) -> Tensor:
        return torch.stack([summing(outputs[i : i + 1], targets[i : i + 1]) for i in range(len(outputs))])

    if not torch.isfinite(sums(outputs, targets)).all():
        raise DoesNotFitError("its result is not finite")
    return Problem(_identity(outputs), outputs, targets, module, sums)


def _identity(x: Tensor) -> nn.Linear:
    linear = nn.Linear(x.shape[-1], x.shape[-1]).double()
    nn.init.eye_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear
