"""y = γ ∘ x̂ + β: g_i = Σ_l δ_il ∘ x̂_il for the scale, Σ_l δ_il for the shift; x̂ is recomputed from x."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from persample.errors import UnsupportedModelError
from persample.sources.backends.contributions import Terms
from persample.sources.backends.fused.memory_format import memory_format
from persample.sources.backends.fused.trace import Trace


def layer_norm(
    trace: Trace,
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """`F.layer_norm`."""
    shape = tuple(normalized_shape)
    result = F.layer_norm(input, shape, trace.value(weight), trace.value(bias), eps)
    return _trailing(
        trace, "F.layer_norm", input, result, shape, weight, bias, lambda x: F.layer_norm(x, shape, eps=eps)
    )


def rms_norm(
    trace: Trace,
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """`F.rms_norm`."""
    shape = tuple(normalized_shape)
    result = F.rms_norm(input, shape, trace.value(weight), eps)
    return _trailing(trace, "F.rms_norm", input, result, shape, weight, None, lambda x: F.rms_norm(x, shape, eps=eps))


def group_norm(
    trace: Trace,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """`F.group_norm`."""
    values = trace.value(weight), trace.value(bias)
    if all(v is None or v.dtype == input.dtype for v in values) and not torch.is_autocast_enabled(input.device.type):
        return _by_kernel(trace, input, num_groups, weight, bias, eps)
    result = F.group_norm(input, num_groups, trace.value(weight), trace.value(bias), eps)
    return _channels(trace, "F.group_norm", input, result, weight, bias, lambda x: F.group_norm(x, num_groups, eps=eps))


def _by_kernel(trace: Trace, x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Group norm by PyTorch's kernels, whose backward pass sums the gradients of scale and shift over the batch.

    With the channels of all images side by side, (1, B·C, …) in B·G groups, that sum is over one image, so the
    gradients of scale and shift that come with the gradient of x are those of the single images.
    """
    rows, images = trace.rows_of_sample(x, "F.group_norm"), len(x)
    channels, pixels = x.shape[1], math.prod(x.shape[2:])
    gamma, beta = trace.value(weight), trace.value(bias)

    def forward(x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        # The result lies in memory as PyTorch's own does: dropout draws its random numbers in that order.
        x = x.contiguous(memory_format=memory_format(x) if x.is_cpu else torch.contiguous_format)
        result, mean, rstd = torch.native_group_norm(x, gamma, beta, images, channels, pixels, groups, eps)
        return result, (x, mean, rstd)

    def backward(
        delta: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, wanted: bool
    ) -> tuple[Tensor | None, Sequence[Terms]]:
        side_by_side = (1, images * channels, pixels)
        gradient, scale, shift = torch.ops.aten.native_group_norm_backward.default(
            # Contiguous, because the kernel reads what it is given by the address alone.
            delta.reshape(side_by_side).contiguous(),
            x.reshape(side_by_side),
            mean.view(1, -1),
            rstd.view(1, -1),
            None if gamma is None else gamma.expand(images, -1).reshape(-1).contiguous(),
            1,
            images * channels,
            pixels,
            images * groups,
            [wanted, True, True],
        )
        terms = [Terms(t.view(-1, rows, channels)) for t in (scale, shift)]
        return gradient.view(x.shape) if wanted else None, terms

    return trace.run(forward, backward, x, trace.layout(x, "F.group_norm"), (weight, bias))


def batch_norm(
    trace: Trace,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`F.batch_norm` with statistics that do not come from the batch."""
    if training:
        raise UnsupportedModelError(
            "F.batch_norm was called with training=True: it normalises with statistics of the whole batch, so the "
            "gradient of a single sample does not exist. Use training=False with running statistics, or group_norm."
        )

    def normalized(x: Tensor) -> Tensor:
        return F.batch_norm(x, running_mean, running_var, training=False, eps=eps)

    result = F.batch_norm(
        input, running_mean, running_var, trace.value(weight), trace.value(bias), False, momentum, eps
    )
    return _channels(trace, "F.batch_norm", input, result, weight, bias, normalized)


def instance_norm(
    trace: Trace,
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`F.instance_norm`."""
    result = F.instance_norm(
        input, running_mean, running_var, trace.value(weight), trace.value(bias), use_input_stats, momentum, eps
    )

    def normalized(x: Tensor) -> Tensor:
        if use_input_stats:
            return F.instance_norm(x, eps=eps)
        return F.batch_norm(x, running_mean, running_var, training=False, eps=eps)

    return _channels(trace, "F.instance_norm", input, result, weight, bias, normalized)


def _trailing(
    trace: Trace,
    operation: str,
    x: Tensor,
    result: Tensor,
    shape: tuple[int, ...],
    weight: Tensor | None,
    bias: Tensor | None,
    normalized: Callable[[Tensor], Tensor],
) -> Tensor:
    """Scale and shift have the trailing `shape`; all other dimensions of a sample are positions."""
    layout = trace.layout(x, operation)
    size = math.prod(shape)

    def for_weight(delta: Tensor, x: Tensor) -> Terms:
        return Terms(layout.sample_first(delta * normalized(x), size).unflatten(-1, shape))

    def for_bias(delta: Tensor, x: Tensor) -> Terms:
        return Terms(layout.sample_first(delta, size).unflatten(-1, shape))

    return trace.tap(result, layout, [(weight, for_weight), (bias, for_bias)], (x,))


def _channels(
    trace: Trace,
    operation: str,
    x: Tensor,
    result: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    normalized: Callable[[Tensor], Tensor],
) -> Tensor:
    """Scale and shift have one entry for each channel, dim 1; the samples are in dim 0, perhaps with others."""
    layout = trace.layout(x, operation)
    rows = trace.rows_of_sample(x, operation)
    channels = x.shape[1]

    def by_channel(terms: Tensor) -> Terms:
        # (B·R, C, …) as (B, R·L, C)
        terms = terms.reshape(layout.batch, rows, channels, -1)
        return Terms(terms.movedim(2, 3).flatten(1, 2))

    def for_weight(delta: Tensor, x: Tensor) -> Terms:
        return by_channel(delta * normalized(x))

    def for_bias(delta: Tensor, x: Tensor) -> Terms:
        return by_channel(delta)

    return trace.tap(result, layout, [(weight, for_weight), (bias, for_bias)], (x,))
