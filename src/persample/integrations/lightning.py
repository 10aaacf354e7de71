"""Lightning: a callback that draws the weights when the Trainer computes gradients outside `optimizer.step`."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, suppress
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from persample.errors import MissingPackageError, OptionError
from persample.integrations.found import found_in
from persample.vogn import VariationalOptimizer

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise MissingPackageError(
        f'persample.integrations.lightning needs lightning ({error}); run: pip install "persample[lightning]"'
    ) from error


class DrawWeights(Callback):  # type: ignore[misc, unused-ignore]
    """Lets a Trainer accumulate gradients, scale losses, save and resume with this package's optimizers.

        trainer = lightning.Trainer(accumulate_grad_batches=4, callbacks=[DrawWeights()])

    The module returns the optimizer from `configure_optimizers`, and mean losses from `training_step`. Without
    accumulation and gradient scaler the Trainer calls `step(closure)`, which draws the weights by itself. With them
    it computes gradients before the step: here each batch then runs in `sampled_params(train=True)`. The batches of a
    step have the same draw, and the Trainer's division of the loss is taken out again, so that together they give what
    one large batch would have given. Clipping, schedulers and logging are the Trainer's. A batch for which
    `training_step` returns None is skipped.

    With several processes (`strategy="ddp"`) give the optimizer `process_group=torch.distributed.group.WORLD`.

    A checkpoint also holds the state of PyTorch's random numbers, from which a resumed training goes on as if it had
    not stopped. Where `validate`, `test` or `predict` loads a checkpoint, the optimizer's state is loaded with the
    weights, so that mean and precision belong together. The optimizer is then looked for among the attributes of the
    module, if the Trainer has none.

    Raises:
        OptionError: at the start of the training, if `mc_samples` is above 1 and the batches run in blocks, or if there
            are several processes and the optimizer has no `process_group`.
    """

    def __init__(self) -> None:
        self._block: AbstractContextManager[None] | None = None
        self._hook: RemovableHandle | None = None
        self._steps: int | None = None

    # Training.

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Run closures passed to `step` in the block of their batch, and the module itself, not a replica."""
        optimizer = _optimizer_of(trainer, pl_module)
        if optimizer is None:
            return
        if isinstance(trainer.strategy.model, DistributedDataParallel):
            if optimizer._processes is None:
                raise OptionError(
                    "Lightning trains in several processes, which the optimizer does not know: pass it "
                    "process_group=torch.distributed.group.WORLD in configure_optimizers()."
                )
            trainer.strategy.model = pl_module  # step() adds up what the processes observed
        if not pl_module.automatic_optimization:
            return
        optimizer._may_skip_batches = True
        self._hook = optimizer.register_step_pre_hook(self._before_step)
        if _scaler_of(trainer) is not None:
            # Of optimizers that look at overflows themselves Lightning believes that they cannot be clipped.
            optimizer._step_supports_amp_scaling = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Draw the weights, if the batch's gradients are not left to `step(closure)`."""
        optimizer, scaler = _optimizer_of(trainer, pl_module), _scaler_of(trainer)
        parts = trainer.accumulate_grad_batches
        if optimizer is None or not pl_module.automatic_optimization or (parts == 1 and scaler is None):
            return
        if optimizer.mc_samples > 1:
            raise OptionError(
                f"mc_samples={optimizer.mc_samples} is not supported with accumulate_grad_batches or a gradient "
                "scaler, with which Lightning runs each batch once, at one draw: set mc_samples=1."
            )
        self._block = optimizer.sampled_params(True, redraw=False, loss_scale=1 / parts, grad_scaler=scaler)
        self._block.__enter__()

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the mean; the recording waits for the step."""
        self._close()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Note that a gradient scaler has divided by its scale, before clipping changes the gradients."""
        found = found_in(optimizer)
        if found is not None and pl_module.automatic_optimization and _scaler_of(trainer) is not None:
            found._take_changes(at_the_step=False)
            self._steps = found.steps + found.skipped_steps

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        """Restore the mean if `training_step` returned None; discard what overflowed if no step was made."""
        self._discard()
        optimizer, steps = _optimizer_of(trainer, pl_module), self._steps
        self._steps = None
        if optimizer is not None and steps == optimizer.steps + optimizer.skipped_steps:
            optimizer.skipped_steps += 1
            optimizer.zero_grad()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore the mean."""
        self._discard(exception)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore the optimizer."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
            optimizer = _optimizer_of(trainer, pl_module)
            if optimizer is not None:
                vars(optimizer).pop("_step_supports_amp_scaling", None)
                vars(optimizer).pop("_may_skip_batches", None)

    # Checkpoints.

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the state of the random number generators."""
        checkpoint[_KEY] = {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: Mapping[str, Any]) -> None:
        """Restore the checkpoint's random number generators; for predictions, its posterior."""
        if trainer.training:
            states = checkpoint.get(_KEY)
            if states is not None:
                torch.set_rng_state(states["cpu"])
                torch.cuda.set_rng_state_all(states["cuda"][: torch.cuda.device_count()])
            return
        optimizer = _optimizer_of(trainer, pl_module)
        saved = checkpoint.get("optimizer_states") or []
        if optimizer is not None and len(saved) == 1:
            optimizer.load_state_dict(saved[0])

    # Inner workings.

    def _before_step(
        self, optimizer: Optimizer, args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]] | None:
        """Run the closure in the open block, and step without it."""
        if self._block is None:
            return None
        closure = kwargs.pop("closure", None) if "closure" in kwargs else args[1]
        with torch.enable_grad():
            closure()
        self._discard()
        return args[:1], kwargs

    def _close(self) -> None:
        block, self._block = self._block, None
        if block is not None:
            block.__exit__(None, None, None)

    def _discard(self, error: BaseException | None = None) -> None:
        """Discard the block."""
        block, self._block = self._block, None
        if block is not None:
            error = error or _NoGradientError()
            with suppress(_NoGradientError):
                block.__exit__(type(error), error, error.__traceback__)


_KEY = "persample.integrations.lightning"


class _NoGradientError(Exception):
    """`training_step` returned None, so there was no backward pass."""


def _optimizer_of(trainer: Trainer, module: LightningModule) -> VariationalOptimizer | None:
    """Return this package's optimizer of the module; None if another one trains it."""
    candidates = [*getattr(trainer, "optimizers", []), *vars(module).values()]
    return next((found for found in map(found_in, candidates) if found is not None), None)


def _scaler_of(trainer: Trainer) -> Any:
    return getattr(trainer.precision_plugin, "scaler", None)
