"""How far two computations of the same number may lie apart before one of them is wrong."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import Node

_RELATIVE = {torch.float64: 1e-7, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 5e-2}


def tolerance(values: Tensor) -> float:
    """Return the relative difference that rounding can explain, for a computation that gave `values`.

    If they have an autograd graph, the least precise of its numbers counts: many language models normalise in
    float32 whatever the dtype of their parameters. Under autocast the results are float32, but most products were
    rounded to 8 (bfloat16) or 11 bits.
    """
    if torch.is_autocast_enabled(values.device.type):
        return _RELATIVE[torch.bfloat16]
    dtypes = {values.dtype} | _dtypes_in_graph(values)
    return max(_RELATIVE.get(dtype, _RELATIVE[torch.float32]) for dtype in dtypes)


def _dtypes_in_graph(values: Tensor) -> set[torch.dtype]:
    dtypes: set[torch.dtype] = set()
    seen: set[Node] = set()
    pending = [values.grad_fn] if values.grad_fn is not None else []
    while pending:
        node = pending.pop()
        if node not in seen:
            seen.add(node)
            dtypes |= {output.dtype for output in node._input_metadata if output.dtype in _RELATIVE}
            pending += [following for following, _ in node.next_functions if following is not None]
    return dtypes
