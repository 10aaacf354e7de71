"""Backend `"vmap"`: the gradient of one sample as a function, mapped over the batch by `torch.func`."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from operator import is_
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch._functorch.eager_transforms import enable_inplace_requires_grad
from torch.func import functional_call, grad_and_value, vmap
from torch.overrides import TorchFunctionMode

from persample.errors import LossError, NonFiniteLossError, OptionError, UnsupportedModelError
from persample.losses import require_losses
from persample.moments import Moments
from persample.sources.backends.chunks import Chunk, moments_of_chunks, per_sample_of_chunks, refuse_chunk_size
from persample.sources.backends.vjp_products import batched_grad
from persample.sources.batch import Batch
from persample.sources.contract import Check
from persample.sources.model.detached_inputs import changeable, entering
from persample.sources.model.random_state import other_random_state, random_state, same_random_state, set_random_state
from persample.sources.model.refusals import FUSED_OR_VJP, describe
from persample.sources.model.state import State, has_values
from persample.sources.selfcheck.oracle import gradient, losses_of_part, runs_in_batches_only
from persample.sources.source import PerSampleGradSource
from persample.sources.splits.tree import Columns

Randomness = Literal["error", "different", "same"]


class VmapSource(PerSampleGradSource):
    """`vmap(grad(ℓ))`, with ℓ the loss of one sample as a function of the parameters.

    Exact wherever `torch.func` can run the model, whatever its layers. It cannot run `.item()`, control flow that
    depends on values, buffers that collect values of the samples, and some kernels (`nn.RNN`, `nn.GRU`): these are
    refused. Where the state of the model changes, one ordinary forward pass is run for it.

    Args:
        model: the network.
        loss_fn: the loss of each sample.
        check: when the self-check runs.
        chunk_size: number of samples per chunk. Memory is that of `chunk_size` × P gradients (P parameters), where
            `per_sample` needs B × P for its result in any case. None takes the whole batch at once.
        randomness: what dropout and other random operations do: `"error"` refuses them, `"different"` draws for
            every sample, `"same"` draws once for all samples. As the random numbers are not those of an ordinary
            forward pass, results are repeatable from a seed, but differ from those of the other backends.

    Raises:
        OptionError: `chunk_size` is not a positive integer or None, or `randomness` is not known.
    """

    method: ClassVar[str] = "torch.func: vmap(grad)"
    ordinary_random_stream: ClassVar[bool] = False

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Any, Any], Any],
        *,
        check: Check = "first",
        chunk_size: int | None = None,
        randomness: Randomness = "error",
    ) -> None:
        super().__init__(model, loss_fn, check=check)
        refuse_chunk_size(chunk_size)
        if randomness not in get_args(Randomness):
            known = ", ".join(map(repr, get_args(Randomness)))
            raise OptionError(f"randomness={randomness!r} is not known: use one of {known}.")
        self.chunk_size = chunk_size
        self.randomness = randomness
        self._stateful = False  # whether the last pass changed the state of the model

    def compute_per_sample(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        losses, gradients = per_sample_of_chunks(self._chunks(batch), self.parameters(), batch.size)
        return self._finite(losses, batch), gradients

    def compute_moments(self, batch: Batch) -> Moments:
        moments = moments_of_chunks(self._chunks(batch), self.parameters(), batch.size)
        return replace(moments, losses=self._finite(moments.losses, batch))

    def _chunks(self, batch: Batch) -> Iterator[Chunk]:
        """Yield losses and gradients, `(b,)` and `(b, *p.shape)`, of one chunk of b samples after the other."""
        size = self.chunk_size or batch.size
        state, before = self.state(), random_state(self.model) if self.randomness == "same" else []
        self._stateful = False
        for start in range(0, batch.size, size):
            set_random_state(before)
            gradients = self._gradients(batch.take(slice(start, start + size)), state)
            self._stateful |= state.changed()
            state.put_back()  # what was kept under the map is of no use, and the next chunk begins from the same
            yield gradients

    def state_changed(self, state: State) -> bool:
        return self._stateful

    def _gradients(self, batch: Batch, state: State) -> tuple[Tensor, dict[str, Tensor]]:
        try:
            columns = batch.columns()
        except UnsupportedModelError:
            if batch.size > 1:
                raise
            losses = self.losses(batch)
            return losses.detach(), {name: g.unsqueeze(0) for name, g in gradient(losses.sum(), self).items()}
        before = other_random_state(self.model)
        try:
            gradients, losses = self._mapped(columns)
        except torch.OutOfMemoryError:
            raise
        except (LossError, RuntimeError, ValueError, IndexError, TypeError) as error:
            # An error that the plain model raises too is the user's own, and is the one to show.
            state.put_back()
            gradient(self.losses(batch).sum(), self)
            losses_of_part(self, batch.take([0]))
            raise self._unsupported(error) from error
        self._refuse_unseen_uses(losses)
        if self.randomness != "same" and not same_random_state(before, other_random_state(self.model)):
            raise UnsupportedModelError(
                "The model draws random numbers from Python's random, NumPy or its own generator, which torch.func "
                "would draw once for all samples: choose randomness='same' if you want that, draw from PyTorch's "
                "default generator, or use another backend."
            )
        return losses.detach(), {name: rows.detach() for name, rows in gradients.items()}

    def _finite(self, losses: Tensor, batch: Batch) -> Tensor:
        """Return the `losses` of single samples; if one is not finite, say whether the batch has the same."""
        try:
            return require_losses(losses, batch.size)
        except NonFiniteLossError as error:
            self.losses(batch)
            raise runs_in_batches_only(1, error) from error

    def _mapped(self, columns: Columns) -> tuple[dict[str, Tensor], Tensor]:
        tensors, sample_of = columns
        keys = [(id(column.tensor), column.dim) for column in tensors]  # one tensor in two places stays one
        distinct = dict(zip(keys, tensors, strict=True))
        model_loss = _ModelLoss(self.model, self.loss_fn)
        names: dict[Tensor, str] = {p: name for name, p in self.parameters().items()}
        places = {place: names[p] for place, p in _places(model_loss, "_parameters") if p in names}
        # Copies, because an update in place would otherwise reach the model.
        kept = {t: t.detach().clone() for t in (*model_loss.buffers(), *self._frozen()) if t not in names}
        others = [*_places(model_loss, "_buffers"), *_places(model_loss, "_parameters")]
        state = {place: kept[tensor] for place, tensor in others if tensor in kept}

        def sample_loss(parameters: dict[str, Tensor], state: dict[str, Tensor], entries: list[Tensor]) -> Tensor:
            state = state | {place: parameters[name] for place, name in places.items()}
            with _Differentiating():
                entered = {
                    key: _entered(column.tensor, entry)
                    for (key, column), entry in zip(distinct.items(), entries, strict=True)
                }
                sample = tuple(sample_of([entered[key] for key in keys]))
                loss: Tensor = functional_call(model_loss, state, sample, tie_weights=False)
            return loss

        dims = [column.dim for column in distinct.values()]
        mapped = vmap(grad_and_value(sample_loss), in_dims=(None, None, dims), randomness=self.randomness)
        values = [column.values.detach() for column in distinct.values()]
        gradients, losses = mapped({name: p.detach() for name, p in self.parameters().items()}, state, values)
        self._stateful |= model_loss.rebinds or any(_written(copy, t) for t, copy in kept.items())
        return gradients, losses

    def _refuse_unseen_uses(self, losses: Tensor) -> None:
        """Raise if the losses depend on a parameter other than by the differentiated copies."""
        if not losses.requires_grad:
            return
        parameters = self.parameters()
        unseen = torch.autograd.grad(losses.sum(), list(parameters.values()), allow_unused=True)
        for name, part in zip(parameters, unseen, strict=True):
            if part is not None:
                raise UnsupportedModelError(
                    f"Parameter {name!r} is used through a reference that is not a registered parameter of a module "
                    "(a list, a closure), which torch.func cannot replace, so its gradient would lack that use: read "
                    "it from its module, or use backend 'vjp'."
                )

    def _unsupported(self, error: BaseException) -> UnsupportedModelError:
        reason = str(error).split("\n")[0].split(". ")[0]
        advice = f"{FUSED_OR_VJP.capitalize()}."
        if "inplace randomness" in reason:
            advice = f"Choose randomness='same', or {FUSED_OR_VJP}."
        elif "random" in reason:
            advice = (
                "Choose randomness='different' (every sample draws its own random numbers) or 'same', or call "
                "model.eval() to switch dropout off."
            )
        elif "broadcast shape" in reason:
            advice = f"It changes a tensor shared by all samples, such as a buffer, in place. {advice}"
        return UnsupportedModelError(f"{self._where(error)} cannot be run by torch.func: {reason}. {advice}")

    def _where(self, error: BaseException) -> str:
        """The innermost module whose code raised `error`."""
        paths = {id(module): path for path, module in self.model.named_modules()}
        modules = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
        for module in reversed(modules):
            if isinstance(module, nn.Module) and id(module) in paths:
                return describe(paths[id(module)], module)
        return describe("", self.model)


def _entered(tensor: Tensor, entry: Tensor) -> Tensor:
    """Return one sample's entry as a batch of one, shaped like `tensor`."""
    return changeable()(entering(lambda _: entry)(tensor))


class _Differentiating(TorchFunctionMode):
    """Lets model and loss use autograd inside a transform of `torch.func`.

    `torch.autograd.grad` gives the right derivatives there, also by the parameters that the transform differentiates
    by. But `x.requires_grad_()` is forbidden, as the transform cannot know of x, and `is_grads_batched=True` goes wrong
    silently.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.requires_grad_:
            with enable_inplace_requires_grad(True):  # for one call: a backward pass forgets it
                return func(*args, **kwargs)
        if func is torch.autograd.grad and kwargs.pop("is_grads_batched", False):
            return batched_grad(*args, **kwargs)
        return func(*args, **kwargs)


class _ModelLoss(nn.Module):
    """Model and loss as one module, so that a loss that reads the model's parameters sees the replaced ones."""

    def __init__(self, model: nn.Module, loss_fn: Callable[[Any, Any], Tensor]) -> None:
        super().__init__()
        self.model = model
        self.loss_fn = loss_fn
        self.rebinds = False  # whether the forward pass puts other tensors in the place of buffers and parameters

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any], targets: Any) -> Tensor:
        tables = [table for m in self.modules() for table in (m._buffers, m._parameters)]
        held = [(table, list(table.values())) for table in tables]
        losses = self.loss_fn(self.model(*args, **kwargs), targets)
        self.rebinds = any(len(t) != len(before) or not all(map(is_, t.values(), before)) for t, before in held)
        if not isinstance(losses, Tensor) or losses.shape != (1,) or not losses.is_floating_point():
            require_losses(losses, 1)  # raises; that the value is finite can be seen only after the map
        loss: Tensor = losses[0]
        return loss


def _written(copy: Tensor, tensor: Tensor) -> bool:
    # By values, too: some kernels of PyTorch (fake quantisation that observes ranges) leave the version as it is.
    return copy._version > 0 or (has_values(copy) and not torch.equal(copy, tensor))


def _places(root: nn.Module, registry: Literal["_parameters", "_buffers"]) -> Iterator[tuple[str, Tensor]]:
    """Yield each attribute that holds a tensor, once: `functional_call` fails if given one twice.

    A module under two names holds its tensors in one place, and tensors that modules share are in several.
    """
    for path, module in root.named_modules():
        for name, tensor in getattr(module, registry).items():
            if tensor is not None:
                yield (f"{path}.{name}" if path else name), tensor
