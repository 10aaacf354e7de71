"""What is known of PyTorch's operations, by name: which keep the shape, which broadcast, which act along dimensions.

An operation that is in no family is tried out (see `propagation`), so these tables only save time, and serve operations
without floating-point results. Each name stands for the function, the method, and their variants in place.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_NAMESPACES = (torch, Tensor, F, torch.special, torch.linalg, torch._C._nn)


def functions(names: str) -> frozenset[Any]:
    """Return all functions that have one of the names, which are separated by blanks."""
    found = set()
    for name in names.split():
        for variant in (name,) if name.endswith("_") else (name, f"{name}_"):
            for namespace in _NAMESPACES:
                function = getattr(namespace, variant, None)
                if isinstance(function, types.GetSetDescriptorType | property):
                    found.add(function.__get__)
                elif callable(function):
                    found.add(function)
    return frozenset(found)


def _by_name(positions: Mapping[str, Any]) -> dict[Any, Any]:
    return {function: value for names, value in positions.items() for function in functions(names)}


#: What is asked of a tensor itself, not of its entries.
METADATA = functions(
    "size dim ndim shape dtype device layout numel nelement stride is_contiguous is_floating_point is_complex is_cuda "
    "is_cpu is_nested is_sparse is_leaf is_inference requires_grad grad_fn data_ptr storage_offset element_size "
    "get_device itemsize nbytes __len__ names is_quantized is_meta is_mps is_same_size _version"
)

#: Results that hold nothing of the samples, only a shape or a type.
CONSTANTS = functions(
    "new_zeros new_ones new_full new_empty new_empty_strided new_tensor zeros_like ones_like full_like empty_like "
    "rand_like randn_like randint_like"
)

#: Where the entries are that are not zero: numbers, which have no gradient.
PLACES_OF_ENTRIES = functions("nonzero argwhere")

#: Entry by entry on the first operand, whatever the others are.
SAME = functions(
    "to type_as type float double half bfloat16 bool int long short byte char cpu cuda clone contiguous detach data "
    "requires_grad_ dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout prelu rrelu bernoulli"
)

#: Entry by entry on operands that are broadcast to each other.
POINTWISE = functions(
    "abs absolute neg negative positive sqrt rsqrt square exp exp2 expm1 log log2 log10 log1p sin cos tan asin acos "
    "atan arcsin arccos arctan sinh cosh tanh asinh acosh atanh arcsinh arccosh arctanh sigmoid logit erf erfc erfinv "
    "lgamma digamma reciprocal relu relu6 elu selu celu gelu silu mish hardtanh hardswish hardsigmoid softplus "
    "softsign logsigmoid log_sigmoid tanhshrink hardshrink softshrink threshold leaky_relu clamp clip clamp_min "
    "clamp_max round floor ceil trunc fix frac sign sgn nan_to_num sinc xlog1py i0 i0e i1 i1e "
    "add sub subtract mul multiply div divide true_divide floor_divide remainder fmod pow float_power rsub maximum "
    "minimum fmax fmin atan2 arctan2 hypot lerp addcmul addcdiv where masked_fill xlogy logaddexp logaddexp2 copysign "
    "copy heaviside ldexp broadcast_tensors fake_quantize_per_tensor_affine fake_quantize_per_channel_affine "
    "__abs__ __neg__ __pos__ __add__ __radd__ __iadd__ __sub__ __rsub__ __isub__ __mul__ __rmul__ __imul__ __truediv__ "
    "__rtruediv__ __itruediv__ __div__ __rdiv__ __idiv__ __floordiv__ __rfloordiv__ __ifloordiv__ __mod__ __rmod__ "
    "__imod__ __pow__ __rpow__ __ipow__"
)

#: The same, with results that have no gradient.
COMPARISONS = functions(
    "eq ne lt le gt ge equal_to not_equal less less_equal greater greater_equal isclose isnan isinf isfinite isneginf "
    "isposinf signbit logical_and logical_or logical_not logical_xor bitwise_and bitwise_or bitwise_not bitwise_xor "
    "__eq__ __ne__ __lt__ __le__ __gt__ __ge__ __and__ __rand__ __iand__ __or__ __ror__ __ior__ __xor__ __rxor__ "
    "__ixor__ __invert__"
)

#: Entry by entry on the first operand, unless they are told to observe the range of all its entries first.
OBSERVING = functions("fused_moving_avg_obs_fake_quant")

#: Operations that keep the row-major order of the first operand's entries.
RESHAPES = functions("view reshape view_as reshape_as flatten unflatten squeeze unsqueeze ravel")

ALL = object()  # the default of operations that act along all dimensions

_REDUCTIONS = (
    "sum mean prod nansum nanmean amax amin std var std_mean var_mean median nanmedian max min aminmax argmax argmin "
    "any all count_nonzero logsumexp"
)
_NORMS = "norm vector_norm"

#: Operations that make an entry of their result from all entries along some dimensions.
REDUCTIONS = functions(f"{_REDUCTIONS} {_NORMS}")

#: Operations along some dimensions only: which argument names these, and what holds if it is left away.
ALONG: Mapping[Any, tuple[int, Any]] = _by_name(
    {
        _REDUCTIONS: (1, ALL),
        _NORMS: (2, ALL),
        "softmax log_softmax softmin cumsum cumprod cummax cummin logcumsumexp": (1, None),
        "sort argsort mode glu": (1, -1),
        "topk kthvalue": (2, -1),
        "flip": (1, None),
        "roll": (2, None),
        "normalize": (2, 1),
        "gather scatter scatter_add scatter_reduce index_select index_add index_copy index_fill": (1, None),
        "take_along_dim repeat_interleave": (2, None),
        "narrow select": (1, None),
        "unbind": (1, 0),
        "chunk split split_with_sizes unsafe_chunk unsafe_split tensor_split": (2, 0),
    }
)

#: Those of them that indices alone may give an entry for each sample.
BY_INDICES = functions("gather scatter scatter_add scatter_reduce take_along_dim")

#: Operations on some trailing dimensions of the first operand: how many, or which argument names them.
LEADING: Mapping[Any, Any] = _by_name(
    {
        "linear": 1,
        "conv1d conv_transpose1d": 2,
        "conv2d conv_transpose2d": 3,
        "conv3d conv_transpose3d": 4,
        "embedding one_hot": 0,
        "layer_norm rms_norm": "normalized_shape",
    }
)

#: Products of the last two dimensions, with all dimensions before them broadcast.
PRODUCTS = functions("matmul __matmul__ bmm scaled_dot_product_attention")

#: Operations that put tensors beside each other: whether along a new dimension.
JOINING: Mapping[Any, bool] = _by_name({"cat concat concatenate": False, "stack": True})

#: Operations that move entries and leave their values alone: which arguments are indices, lengths and masks.
MOVES: Mapping[Any, tuple[int | str, ...]] = _by_name(
    {
        "permute transpose swapaxes swapdims movedim moveaxis t T mT narrow select split chunk unbind tensor_split "
        "split_with_sizes unsafe_chunk unsafe_split hsplit vsplit dsplit expand expand_as broadcast_to unfold diagonal "
        "flip fliplr flipud roll rot90 repeat tile pixel_shuffle pixel_unshuffle channel_shuffle cat concat "
        "concatenate stack hstack vstack dstack column_stack row_stack atleast_1d atleast_2d atleast_3d adjoint "
        "block_diag select_scatter slice_scatter diagonal_scatter view reshape view_as reshape_as flatten unflatten "
        "squeeze unsqueeze ravel select_copy narrow_copy __reversed__": (),
        "__getitem__ __setitem__ index_put masked_select masked_scatter take take_along_dim repeat_interleave "
        "_pack_padded_sequence _pad_packed_sequence": (1, "indices", "mask", "index", "repeats", "lengths"),
        "gather index_select index_copy scatter": (2, "index"),
    }
)


#: Operations that add entries of their fourth operand to those of the first, along a dimension, where numbers say.
ADDITIONS = functions("index_add")

#: Operations that write entries into their first operand, or a copy of it, and leave others as they are.
INTO = functions("scatter scatter_add scatter_reduce index_add index_copy index_fill")

#: Operations of which the values of samples may say whose the entries of the result are.
VALUES_MATTER = frozenset(
    (*MOVES, *ALONG, *functions("index_add index_reduce put embedding_bag segment_reduce bincount where masked_fill"))
)

#: Operations of which the values of real numbers say where entries come from.
POSITIONS = functions("grid_sample grid_sampler")

#: Operations that give their first operand another shape or other contents.
RESHAPES_IN_PLACE = functions("transpose_ t_ swapaxes_ swapdims_ resize_ resize_as_ set_ as_strided_") | {
    Tensor.data.__set__  # type: ignore[attr-defined]
}


def index_arguments(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    """Return the arguments of an operation of `MOVES` that are indices."""
    indices = MOVES[func]
    found = [args[index] for index in indices if isinstance(index, int) and index < len(args)]
    return found + [kwargs[index] for index in indices if isinstance(index, str) and index in kwargs]


def gives_nothing_of_samples(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether the result has no gradient and holds no samples: a shape, a type, or indices of entries."""
    one_operand = len(args) + len(kwargs) == 1
    return func in CONSTANTS or func in PLACES_OF_ENTRIES or (one_operand and func in _WHERE)


_WHERE = functions("where")


def dims_of(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Return the dimensions along which an operation of `ALONG` acts: numbers, `ALL`, or None if unknown."""
    position, default = ALONG[func]
    given = [kwargs[name] for name in ("dim", "dims", "axis") if name in kwargs] or [*args[position : position + 1]]
    if not given or given[0] is None:
        return default if default is ALL or default is None else (default,)
    dims = given[0]
    if position == 1 and len(args) > 2 and func in _SEVERAL_NUMBERS:
        dims = args[1:]
    if type(dims) is int:
        return (dims,)
    if isinstance(dims, tuple | list) and all(type(d) is int for d in dims):
        return tuple(dims) or ALL
    return None


_SEVERAL_NUMBERS = functions("flip")


def is_in_place(func: Any) -> bool:
    """Whether an operation writes into its first operand."""
    name = getattr(func, "__name__", "")
    return (name.endswith("_") and not name.endswith("__")) or name in _IN_PLACE


def asked_in_place(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a function of `torch.nn.functional` is asked to write into its first operand, by its flag `inplace`."""
    position = _FLAG.get(func)
    if position is None:
        return False
    return bool(kwargs.get("inplace", args[position] if position < len(args) else False))


_FLAG = {
    function: names.index("inplace")
    for function in vars(F).values()
    if isinstance(function, types.FunctionType) and "inplace" in (names := list(inspect.signature(function).parameters))
}

_IN_PLACE = {"__setitem__"} | {
    f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "div", "floordiv", "mod", "pow")
}


#: Operations of `POINTWISE` with one result, which is not written into an operand.
SHAPE_KEEPING = frozenset(f for f in POINTWISE - functions("where broadcast_tensors") if not is_in_place(f))


def name_of(func: Any) -> str:
    """Return how errors name an operation."""
    return getattr(func, "__name__", str(func))
