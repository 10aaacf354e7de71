"""Hugging Face's Trainer: gradients at draws of the weights, and evaluation averaged over draws."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from persample.errors import MissingPackageError, OptionError, UsageError
from persample.integrations.averaged import Outputs, averaged, loss_like, require_outputs
from persample.integrations.found import found_in, optimizer_in
from persample.vogn import VariationalOptimizer

try:
    from transformers import Trainer
except ImportError as error:
    raise MissingPackageError(
        f"persample.integrations.transformers needs transformers and accelerate ({error}); run: pip install "
        '"persample[transformers]"'
    ) from error


class VariationalMixin:
    """What `VariationalTrainer` adds to a `Trainer`; for Trainers of others: `class Mine(VariationalMixin, Other)`.

    Args:
        samples: the number of draws that `evaluate` and `predict` average over; 0 takes the mean of the weights.
        likelihood: what the outputs are: "categorical" (logits, classes in the last dimension), "bernoulli" (a logit
            for each class) or "gaussian" (real numbers). None finds it by the loss that the model returns.
        seed_of_draws: of the draws for evaluation, which are the same for all batches, and take no random numbers from
            the training.
        args: those of the Trainer, among them `optimizers=(optimizer, None)`.
        kwargs: likewise.
    """

    def __init__(
        self,
        *args: Any,
        samples: int = 32,
        likelihood: Outputs | None = None,
        seed_of_draws: int = 0,
        **kwargs: Any,
    ) -> None:
        if type(samples) is not int or samples < 0:
            raise OptionError(f"samples={samples!r} must be a whole number >= 0.")
        require_outputs(likelihood)
        self.samples, self.likelihood, self.seed_of_draws = samples, likelihood, seed_of_draws
        self._factor: float | None = None
        super().__init__(*args, **kwargs)

    # Training.

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None, *args: Any) -> Tensor:
        """Run forward and backward at a draw of the weights, and record the moments.

        The batches of one step have the same draw, unless `mc_samples` asks for several. By whatever the Trainer
        multiplies the loss is taken out again.
        """
        optimizer = self._posterior_optimizer()
        if isinstance(model, DistributedDataParallel):
            model = model.module  # the processes add up their moments in step()
        losses = []
        with self._watching(optimizer.mc_samples):
            for _ in range(optimizer.mc_samples):
                self._factor = None
                with optimizer.sampled_params(
                    True,
                    redraw=optimizer.mc_samples > 1,
                    loss_scale=self._loss_scale,
                    grad_scaler=self.accelerator.scaler,  # type: ignore[attr-defined]
                ):
                    losses.append(super().training_step(model, inputs, None, *args))  # type: ignore[misc]
        return torch.stack(losses).sum()

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the mean loss of this batch alone.

        The number of items of all accumulated batches, by which some models divide and others do not, is kept back.
        """
        return super().compute_loss(model, inputs, return_outputs=return_outputs, num_items_in_batch=None)  # type: ignore[misc]

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; with `load_best_model_at_end` the best posterior is loaded, not only its mean."""
        output = super().train(*args, **kwargs)  # type: ignore[misc]
        best = self.state.best_model_checkpoint  # type: ignore[attr-defined]
        if self.args.load_best_model_at_end and best is not None:  # type: ignore[attr-defined]
            path = Path(best) / "optimizer.pt"
            if not path.exists():
                raise UsageError(
                    f"The weights of the best checkpoint were loaded, but it has no {path.name}, so the posterior's "
                    "precision there is unknown: set save_only_model=False."
                )
            self._posterior_optimizer().load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        return output

    # Evaluation.

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Any, Any, Any]:
        """Predict by the average over draws: logits are logarithms of averaged probabilities, the loss is theirs."""
        optimizer = found_in(self.optimizer)  # type: ignore[attr-defined]
        if optimizer is None or self.samples == 0:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)  # type: ignore[misc, no-any-return]
        generator = torch.Generator().manual_seed(self.seed_of_draws)
        losses, outputs = [], []
        labels = None
        for _ in range(self.samples):
            with optimizer.sampled_params(generator=generator):
                loss, output, labels = super().prediction_step(model, dict(inputs), False, ignore_keys)  # type: ignore[misc]
            losses.append(loss)
            outputs.append(output)
        loss, output = self._averaged(losses, outputs, labels)
        return (loss, None, None) if prediction_loss_only else (loss, output, labels)

    # Inner workings.

    def _averaged(self, losses: list[Any], outputs: list[Any], labels: Any) -> tuple[Any, Any]:
        """Return loss and outputs of the averaged prediction."""
        first = outputs[0] if isinstance(outputs[0], Tensor) else outputs[0][0]
        found = None
        if losses[0] is not None and isinstance(labels, Tensor):
            found = loss_like(first, labels, losses[0], smoothing=self.args.label_smoothing_factor)  # type: ignore[attr-defined]
        likelihood = self.likelihood or (found and found[0])
        if likelihood is None:
            reason = "the data have no labels, and so no loss that tells what the outputs are"
            if losses[0] is not None:
                reason = "the loss is neither a mean cross-entropy, nor a binary one, nor a squared error"
            raise UsageError(
                f"The outputs of draws cannot be averaged, because {reason}: pass the Trainer likelihood="
                '"categorical", "bernoulli" or "gaussian", or samples=0 to evaluate at the mean of the weights.'
            )
        if isinstance(outputs[0], Tensor):
            output: Any = averaged(likelihood, torch.stack(outputs))
            leading = output
        else:
            leading = averaged(likelihood, torch.stack([o[0] for o in outputs]))
            output = (leading, *_means(outputs))
        if losses[0] is None:
            return None, output
        if found is not None and found[0] == likelihood:
            return found[1](leading), output
        return torch.stack(losses).mean(), output

    def _posterior_optimizer(self) -> VariationalOptimizer:
        return optimizer_in(
            self.optimizer,  # type: ignore[attr-defined]
            "pass optimizers=(persample.VOGN(model, data_size=len(train_dataset)), None) to the Trainer",
        )

    @contextmanager
    def _watching(self, parts: int) -> Iterator[None]:
        """Divide what `compute_loss`, maybe a subclass's, returns, and note its factor in the backward pass."""
        compute_loss = self.compute_loss

        def watched(*args: Any, **kwargs: Any) -> Any:
            found = compute_loss(*args, **kwargs)
            loss, *others = found if isinstance(found, tuple) else (found,)
            loss.register_hook(self._watch)
            return (loss / parts, *others) if isinstance(found, tuple) else loss / parts

        vars(self)["compute_loss"] = watched
        try:
            yield
        finally:
            vars(self).pop("compute_loss")

    def _watch(self, gradient: Tensor) -> None:
        self._factor = float(gradient)

    def _loss_scale(self) -> float:
        scaler = self.accelerator.scaler  # type: ignore[attr-defined]
        return (1.0 if self._factor is None else self._factor) / (1.0 if scaler is None else scaler.get_scale())


def _means(outputs: list[Any]) -> list[Any]:
    """Average each further output of real numbers over draws; take others from the first draw."""
    return [
        torch.stack(values).mean(0) if isinstance(values[0], Tensor) and values[0].is_floating_point() else values[0]
        for values in list(zip(*outputs, strict=True))[1:]
    ]


class VariationalTrainer(VariationalMixin, Trainer):  # type: ignore[misc, unused-ignore]
    """A `Trainer` that trains and evaluates a posterior over the weights.

        optimizer = persample.VOGN(model, data_size=len(train_dataset))
        trainer = VariationalTrainer(model, args, train_dataset=…, eval_dataset=…, optimizers=(optimizer, None))
        trainer.train()
        trainer.evaluate()

    Accumulation, mixed precision, clipping, schedulers and checkpoints are the Trainer's. A sample is a row of the
    batch, so `data_size` is the length of the data set, and each batch counts by its number of rows. The model's loss
    must be a mean over its samples: one over all tokens of a batch in which some sequences have more ignored labels
    (−100) than others depends on the whole batch, and is refused by VOGN (not by IVON, Vadam and MeanFieldVI). Pass a
    `compute_loss_func` with the mean over sequences of a loss for each.

    `evaluate` and `predict` average over `samples` draws; see `VariationalMixin` for that and the other arguments.
    """
