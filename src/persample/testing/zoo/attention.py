"""Attention and transformers."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from persample.testing.zoo.case import Case, Inputs, Net, both, frozen, parameter, reals


def _causal(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).triu(1)


def _hidden(size: int) -> Tensor:
    """Each sample hides some of its three positions, never all."""
    return torch.arange(3) >= torch.tensor([3, 1, 2, 3, 2])[:size, None]


def _attend(model: Any, x: Tensor, *others: Tensor, **options: Any) -> Any:
    key, value = others or (x, x)
    return model.attention(x, key, value, **_beside(x, options))[0]


def _beside(x: Tensor, options: dict[str, Any]) -> dict[str, Any]:
    """Return `options` with their tensors on the device of `x`."""
    return {name: value.to(x.device) if isinstance(value, Tensor) else value for name, value in options.items()}


def _attention(name: str, call: dict[str, Any] | None = None, inputs: Inputs | None = None, **options: Any) -> Case:
    def build() -> nn.Module:
        attention = nn.MultiheadAttention(4, 2, **{"batch_first": True} | options)
        return Net(partial(_attend, **(call or {})), attention=attention)

    return Case(f"MultiheadAttention {name}", build, inputs or reals(3, 4))


def _hidden_positions(model: Any, x: Tensor, hidden: Tensor) -> Any:
    return model.attention(x, x, x, key_padding_mask=hidden, attn_mask=_causal(3), need_weights=False)[0]


def _of_weights(model: Any, x: Tensor) -> Any:
    output, weights = model.attention(x, x, x)
    return torch.cat([output.flatten(1), weights.flatten(1)], dim=1)


def _of_single_heads(model: Any, x: Tensor) -> Any:
    output, weights = model.attention(x, x, x, average_attn_weights=False)
    return torch.cat([output.flatten(1), weights.flatten(1)], dim=1)


def _time_first(model: Any, x: Tensor, **options: Any) -> Any:
    y = x.transpose(0, 1)
    return model.attention(y, y, y, **options)[0].transpose(0, 1)


def _mask_for_each_sample(model: Any, x: Tensor, mask: Tensor) -> Any:
    return model.attention(x, x, x, attn_mask=mask.repeat_interleave(2, 0), need_weights=False)[0]


ATTENTION = (
    _attention("without weights", {"need_weights": False}),
    _attention("with weights", {"need_weights": True}),
    _attention("without bias", bias=False),
    _attention("with a causal mask", {"attn_mask": _causal(3), "need_weights": False}),
    _attention("with a causal mask and weights", {"attn_mask": _causal(3)}),
    _attention("declared causal", {"attn_mask": _causal(3), "is_causal": True, "need_weights": False}),
    _attention("with a mask of numbers", {"attn_mask": torch.linspace(-1, 1, 9, dtype=torch.float64).view(3, 3)}),
    _attention("to others", {"need_weights": False}, both(reals(3, 4), reals(5, 4), reals(5, 4))),
    _attention("to others of other widths", None, both(reals(3, 4), reals(5, 2), reals(5, 3)), kdim=2, vdim=3),
    _attention("with learned keys and values", add_bias_kv=True),
    _attention("with an attention to zero", add_zero_attn=True),
    _attention("with dropout", dropout=0.3),
    Case(
        "MultiheadAttention whose weights are used",
        lambda: Net(_of_weights, attention=nn.MultiheadAttention(4, 2, batch_first=True)),
        reals(3, 4),
    ),
    Case(
        "MultiheadAttention whose single heads' weights are used",
        lambda: Net(_of_single_heads, attention=nn.MultiheadAttention(4, 2, batch_first=True)),
        reals(3, 4),
    ),
    Case(
        "MultiheadAttention with hidden positions and a causal mask",
        lambda: Net(_hidden_positions, attention=nn.MultiheadAttention(4, 2, batch_first=True)),
        both(reals(3, 4), _hidden),
    ),
    Case(
        "MultiheadAttention with hidden positions",
        lambda: Net(
            lambda m, x, hidden: m.attention(x, x, x, key_padding_mask=hidden)[0],
            attention=nn.MultiheadAttention(4, 2, batch_first=True),
        ),
        both(reals(3, 4), _hidden),
    ),
    Case(
        "MultiheadAttention with a mask for each sample",
        lambda: Net(_mask_for_each_sample, attention=nn.MultiheadAttention(4, 2, batch_first=True)),
        both(reals(3, 4), lambda size: torch.randn(size, 3, 3, dtype=torch.float64)),
    ),
    Case(
        "MultiheadAttention in eval mode",
        lambda: Net(_attend, attention=nn.MultiheadAttention(4, 2, batch_first=True)).eval(),
        reals(3, 4),
    ),
    Case("MultiheadAttention time first", lambda: Net(_time_first, attention=nn.MultiheadAttention(4, 2)), reals(3, 4)),
    Case(
        "MultiheadAttention time first without weights",
        lambda: Net(lambda m, x: _time_first(m, x, need_weights=False), attention=nn.MultiheadAttention(4, 2)),
        reals(5, 4),
    ),
    Case(
        "MultiheadAttention with frozen input weights",
        lambda: frozen(
            Net(_attend, attention=nn.MultiheadAttention(4, 2, batch_first=True)), "attention.in_proj_weight"
        ),
        reals(3, 4),
    ),
    Case("Attention by hand", lambda: Net(_by_hand, qkv=nn.Linear(4, 12), out=nn.Linear(4, 4)), reals(5, 4)),
    Case(
        "Scaled dot product attention",
        lambda: Net(_scaled_dot_product, qkv=nn.Linear(4, 12), out=nn.Linear(4, 4)),
        reals(5, 4),
    ),
    Case(
        "Grouped queries with rotated positions",
        lambda: Net(_grouped_queries, q=nn.Linear(4, 4), kv=nn.Linear(4, 4), out=nn.Linear(4, 4)),
        reals(5, 4),
    ),
    Case(
        "Attention with a learned bias of positions",
        lambda: Net(_with_position_bias, qkv=nn.Linear(4, 12), bias=parameter(2, 5, 5)),
        reals(5, 4),
    ),
    Case(
        "Attention pooling with a learned query",
        lambda: Net(_pooled, query=parameter(1, 1, 4), attention=nn.MultiheadAttention(4, 2, batch_first=True)),
        reals(3, 4),
    ),
    Case("Attention in windows", lambda: Net(_in_windows, qkv=nn.Linear(4, 12)), reals(6, 4)),
)


def _heads(t: Tensor) -> Any:
    """`(B, T, 2·D)` as `(B, 2, T, D)`."""
    return t.unflatten(-1, (2, -1)).transpose(1, 2)


def _by_hand(model: Any, x: Tensor) -> Any:
    q, k, v = model.qkv(x).chunk(3, dim=-1)
    weights = (_heads(q) @ _heads(k).mT / 2**0.5).masked_fill(_causal(x.shape[1]), -torch.inf).softmax(-1)
    return model.out((weights @ _heads(v)).transpose(1, 2).flatten(2))


def _scaled_dot_product(model: Any, x: Tensor) -> Any:
    q, k, v = map(_heads, model.qkv(x).split(4, dim=-1))
    return model.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(x.shape))


def _rotated(t: Tensor) -> Tensor:
    angles = torch.arange(t.shape[-2], dtype=t.dtype)[:, None]
    first, second = t.chunk(2, dim=-1)
    return torch.cat([first * angles.cos() - second * angles.sin(), first * angles.sin() + second * angles.cos()], -1)


def _grouped_queries(model: Any, x: Tensor) -> Any:
    q, (k, v) = _heads(model.q(x)), model.kv(x).unsqueeze(1).chunk(2, dim=-1)
    attended = F.scaled_dot_product_attention(_rotated(q), _rotated(k).expand_as(q), v.expand_as(q))
    return model.out(attended.transpose(1, 2).flatten(2))


def _with_position_bias(model: Any, x: Tensor) -> Any:
    q, k, v = map(_heads, model.qkv(x).chunk(3, dim=-1))
    return ((q @ k.mT + model.bias).softmax(-1) @ v).transpose(1, 2).flatten(2)


def _pooled(model: Any, x: Tensor) -> Any:
    return model.attention(model.query.expand(len(x), -1, -1), x, x)[0]


def _in_windows(model: Any, x: Tensor) -> Any:
    q, k, v = model.qkv(x.reshape(-1, 3, 4)).chunk(3, dim=-1)
    return (q @ k.mT).softmax(-1).matmul(v).reshape(x.shape)


def _encoder(options: dict[str, Any], train: bool) -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, 5, **options).train(train)
    if options["batch_first"]:
        return layer
    return Net(lambda m, x: m.layer(x.transpose(0, 1)).transpose(0, 1), layer=layer)


def _encoders() -> Iterator[Case]:
    for norm_first in (False, True):
        for batch_first in (False, True):
            for train in (False, True):
                options = {"norm_first": norm_first, "batch_first": batch_first, "dropout": 0.0}
                name = (
                    f"TransformerEncoderLayer, {'norm first' if norm_first else 'norm last'}, "
                    f"{'batch first' if batch_first else 'time first'}, in {'training' if train else 'eval'} mode"
                )
                yield Case(name, partial(_encoder, options, train), reals(3, 4))


def _layer(**options: Any) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(4, 2, 5, **{"dropout": 0.0, "batch_first": True} | options)


TRANSFORMERS = (
    *_encoders(),
    Case("TransformerEncoderLayer with dropout", lambda: _layer(dropout=0.3), reals(3, 4)),
    Case(
        "TransformerEncoderLayer with gelu and without biases",
        lambda: _layer(activation="gelu", bias=False),
        reals(3, 4),
    ),
    Case(
        "TransformerEncoderLayer with hidden positions",
        lambda: Net(lambda m, x, hidden: m.layer(x, src_key_padding_mask=hidden), layer=_layer()),
        both(reals(3, 4), _hidden),
    ),
    Case(
        "TransformerEncoderLayer with hidden positions in eval mode",
        lambda: Net(lambda m, x, hidden: m.layer(x, src_key_padding_mask=hidden), layer=_layer()).eval(),
        both(reals(3, 4), _hidden),
    ),
    Case(
        "TransformerEncoderLayer with a causal mask",
        lambda: Net(lambda m, x: m.layer(x, src_mask=_causal(3)), layer=_layer()),
        reals(3, 4),
    ),
    Case("TransformerEncoder of two layers", lambda: nn.TransformerEncoder(_layer(), 2, nn.LayerNorm(4)), reals(3, 4)),
    Case(
        "TransformerEncoder of two layers with hidden positions in eval mode",
        lambda: Net(
            lambda m, x, hidden: m.encoder(x, src_key_padding_mask=hidden), encoder=nn.TransformerEncoder(_layer(), 2)
        ).eval(),
        both(reals(3, 4), lambda size: _hidden(size) & (torch.arange(size) > 0)[:, None]),
    ),
    Case(
        "TransformerDecoderLayer",
        lambda: nn.TransformerDecoderLayer(4, 2, 5, dropout=0.0, batch_first=True),
        both(reals(3, 4), reals(5, 4)),
    ),
    Case(
        "Transformer",
        lambda: nn.Transformer(4, 2, 1, 1, 5, dropout=0.0, batch_first=True),
        both(reals(3, 4), reals(2, 4)),
    ),
)
