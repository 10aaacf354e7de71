"""Accelerate: `sampled_params` for a prepared optimizer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from persample.integrations.found import optimizer_in


@contextmanager
def sampled_params(accelerator: Any, optimizer: Any, **options: Any) -> Iterator[None]:
    """Put a draw of the weights into the model, and record the moments of the gradients there.

        for inputs, targets in loader:
            with accelerator.accumulate(model):
                with sampled_params(accelerator, optimizer):
                    loss = F.cross_entropy(model(inputs), targets)
                    accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()

    `accelerator.backward` divides the loss by `gradient_accumulation_steps`, and multiplies it by the scale of mixed
    precision; both are taken out again. The batches of one step have the same draw, so together they give exactly what
    one large batch would have given.

    With several processes, prepare the loader and the optimizer, but not the model, which would be wrapped in
    DistributedDataParallel; give the optimizer `process_group=torch.distributed.group.WORLD`.

    Args:
        accelerator: the `accelerate.Accelerator`.
        optimizer: what its `prepare` returned for the optimizer, or the optimizer itself.
        options: further arguments of `VariationalOptimizer.sampled_params`.

    Raises:
        UsageError: the optimizer is none of this package; and whatever `sampled_params` of the optimizer raises.
    """
    inner = optimizer_in(optimizer, "prepare and pass an optimizer such as persample.VOGN(model, data_size=…)")
    steps = accelerator.gradient_accumulation_steps
    of_trainer = {"redraw": False, "loss_scale": 1 / steps, "grad_scaler": accelerator.scaler}
    with inner.sampled_params(True, **(of_trainer | options)):
        yield
