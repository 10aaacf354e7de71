"""Recurrent layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from persample.testing.zoo.case import Case, Net, both, parameter, reals

_KINDS: dict[str, Any] = {"RNN": nn.RNN, "LSTM": nn.LSTM, "GRU": nn.GRU}
_OPTIONS: dict[str, dict[str, Any]] = {
    "": {},
    " of two layers": {"num_layers": 2},
    " in both directions": {"bidirectional": True},
    " of two layers in both directions": {"num_layers": 2, "bidirectional": True},
    " without bias": {"bias": False},
    " with dropout between the layers": {"num_layers": 2, "dropout": 0.3},
}


def _outputs(model: Any, x: Tensor) -> Any:
    return model.rnn(x)[0]


def _time_first(model: Any, x: Tensor) -> Any:
    return model.rnn(x.transpose(0, 1))[0].transpose(0, 1)


def _last_states(model: Any, x: Tensor) -> Any:
    states = model.rnn(x)[1]
    return torch.cat([s.transpose(0, 1).flatten(1) for s in (states if isinstance(states, tuple) else (states,))], 1)


def _with_options() -> Iterator[Case]:
    for name, kind in _KINDS.items():
        for label, options in _OPTIONS.items():
            yield Case(name + label, partial(_net, _outputs, kind, batch_first=True, **options), reals(5, 4))
        yield Case(f"{name} time first", partial(_net, _time_first, kind), reals(5, 4))
        both_ways = partial(_net, _last_states, kind, num_layers=2, batch_first=True, bidirectional=True)
        yield Case(f"{name}, its last states", both_ways, reals(5, 4))


def _net(function: Callable[..., Any], kind: Any, **options: Any) -> nn.Module:
    return Net(function, rnn=kind(4, 3, **options))


def _from_states(model: Any, x: Tensor, h: Tensor) -> Any:
    return model.rnn(x, h.transpose(0, 1).contiguous())[0]


def _from_learned_state(model: Any, x: Tensor) -> Any:
    return model.rnn(x, model.state.expand(-1, len(x), -1).contiguous())[0]


def _cells(model: Any, x: Tensor) -> Any:
    state, outputs = None, []
    for t in range(x.shape[1]):
        state = model.cell(x[:, t], state)
        outputs.append(state[0] if isinstance(state, tuple) else state)
    return torch.stack(outputs, dim=1)


def _packed(model: Any, x: Tensor, lengths: Tensor) -> Any:
    packed = nn.utils.rnn.pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
    return nn.utils.rnn.pad_packed_sequence(model.rnn(packed)[0], batch_first=True, total_length=x.shape[1])[0]


CASES = (
    *_with_options(),
    Case(
        "RNN with rectified units",
        lambda: Net(_outputs, rnn=nn.RNN(4, 3, nonlinearity="relu", batch_first=True)),
        reals(5, 4),
    ),
    Case("LSTM with projections", lambda: Net(_outputs, rnn=nn.LSTM(4, 3, proj_size=2, batch_first=True)), reals(5, 4)),
    Case(
        "LSTM of two layers in both directions with projections",
        lambda: Net(_outputs, rnn=nn.LSTM(4, 3, 2, proj_size=2, batch_first=True, bidirectional=True)),
        reals(5, 4),
    ),
    Case(
        "GRU from given states",
        lambda: Net(_from_states, rnn=nn.GRU(4, 3, batch_first=True)),
        both(reals(5, 4), reals(1, 3)),
    ),
    Case(
        "GRU from a learned state",
        lambda: Net(_from_learned_state, rnn=nn.GRU(4, 3, batch_first=True), state=parameter(1, 1, 3)),
        reals(5, 4),
    ),
    Case(
        "LSTM in eval mode",
        lambda: Net(_outputs, rnn=nn.LSTM(4, 3, 2, batch_first=True, dropout=0.3)).eval(),
        reals(5, 4),
    ),
    Case(
        "GRU between layers",
        lambda: Net(
            lambda m, x: m.head(m.rnn(m.stem(x))[0][:, -1]),
            stem=nn.Linear(4, 3),
            rnn=nn.GRU(3, 3, batch_first=True),
            head=nn.Linear(3, 2),
        ),
        reals(5, 4),
    ),
    Case("GRU twice", lambda: Net(lambda m, x: m.rnn(m.rnn(x)[0])[0], rnn=nn.GRU(4, 4, batch_first=True)), reals(3, 4)),
    Case("RNNCell", lambda: Net(_cells, cell=nn.RNNCell(4, 3)), reals(3, 4)),
    Case("LSTMCell", lambda: Net(_cells, cell=nn.LSTMCell(4, 3)), reals(3, 4)),
    Case("GRUCell", lambda: Net(_cells, cell=nn.GRUCell(4, 3)), reals(3, 4)),
    Case(
        "GRU of packed sequences",
        lambda: Net(_packed, rnn=nn.GRU(4, 3, batch_first=True)),
        both(reals(5, 4), lambda size: torch.tensor([5, 2, 3, 5, 1])[:size]),
    ),
)
