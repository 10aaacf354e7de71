"""Which operation of PyTorch has which rule."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from persample.sources.backends.fused.op_table import COMPARISONS, JOINING, POINTWISE, functions, is_in_place
from persample.sources.backends.fused.rules import decompositions, recurrent
from persample.sources.backends.fused.rules.channel_groups import in_groups
from persample.sources.backends.fused.rules.convolution import convolutions, transposed_convolutions
from persample.sources.backends.fused.rules.embedding import embedding, embedding_bag
from persample.sources.backends.fused.rules.expanded import batched, beside_each_other, entry_by_entry
from persample.sources.backends.fused.rules.fallback import fallback as fallback
from persample.sources.backends.fused.rules.grouped_mm import grouped_mm
from persample.sources.backends.fused.rules.in_place import change_samples, fill, index_put, written_into
from persample.sources.backends.fused.rules.linear import linear, matmul
from persample.sources.backends.fused.rules.nondifferentiable import as_told, values_alone
from persample.sources.backends.fused.rules.normalization import (
    batch_norm,
    group_norm,
    instance_norm,
    layer_norm,
    rms_norm,
)
from persample.sources.backends.fused.rules.reorder import in_order
from persample.sources.backends.fused.trace import Trace

Rule = Callable[..., Any]


def _each(rules: Mapping[str, Rule]) -> dict[Any, Rule]:
    return {func: rule for names, rule in rules.items() for func in functions(names) if not is_in_place(func)}


def _general(functions: Iterable[Any], rule: Rule) -> dict[Any, Rule]:
    """A rule for several operations; its first argument says which."""

    def rule_for(func: Any) -> Rule:
        return lambda trace, *args, **kwargs: rule(trace, func, args, kwargs)

    return {func: rule_for(func) for func in functions}


def _of_reals(rules: Mapping[Any, Rule]) -> dict[Any, Rule]:
    """Rules whose products are those of real numbers (without conjugates); complex ones are mapped over the samples."""

    def for_reals(func: Any, rule: Rule) -> Rule:
        def choose(trace: Trace, input: Tensor, *args: Any, **kwargs: Any) -> Any:
            if input.is_complex():
                return fallback(trace, func, (input, *args), kwargs)
            return rule(trace, input, *args, **kwargs)

        return choose

    return {func: for_reals(func, rule) for func, rule in rules.items()}


#: `rule(trace, *args, **kwargs)` runs the operation and returns its result with a tap.
RULES: Mapping[Any, Rule] = {
    **_general(POINTWISE, entry_by_entry),
    **_general(COMPARISONS | functions("equal allclose"), values_alone),
    **_general(JOINING, beside_each_other),
    **_general(recurrent.layers, recurrent.recurrent),
    **recurrent.cells,
    **_general([F.scaled_dot_product_attention], batched),
    torch.linalg.solve: decompositions.solve,
    **_general(functions("to type_as expand_as view_as reshape_as"), as_told),
    **_each(
        {
            "mv": decompositions.matmul,
            "addmm addmv baddbmm": decompositions.addmm,
            "bilinear": decompositions.bilinear,
            "prelu": decompositions.prelu,
            "linear_cross_entropy": decompositions.linear_cross_entropy,
            "masked_fill": decompositions.masked_fill,
            "index_put": index_put,
            "index_select": decompositions.index_select,
            "gather": decompositions.gather,
            "take": decompositions.take,
            "__getitem__": decompositions.looked_up,
        }
    ),
    **_each({"_grouped_mm": grouped_mm}),
    **_general([Tensor.masked_fill_], change_samples),
    Tensor.__setitem__: written_into,
    Tensor.fill_: fill,
    **_of_reals(
        _each({"matmul mm __matmul__": matmul})
        | {func: in_groups(func, in_order(rule)) for func, rule in (convolutions | transposed_convolutions).items()}
        | {F.linear: linear}
    ),
    F.embedding: embedding,
    torch.embedding: decompositions.embedding,
    F.embedding_bag: embedding_bag,
    F.layer_norm: layer_norm,
    F.group_norm: in_order(group_norm),
    F.batch_norm: in_order(batch_norm),
    F.instance_norm: in_order(instance_norm),
    F.rms_norm: rms_norm,
}
