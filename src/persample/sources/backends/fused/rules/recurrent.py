"""RNN, LSTM and GRU layers, step by step.

With the input x_t, the state h_{t−1} before the step, and the pre-activations a_t = W_ih x_t + b_ih of all gates,

    RNN    h_t = tanh or relu (a_t + W_hh h_{t−1} + b_hh)
    LSTM   i, f, g, o = a_t + W_hh h_{t−1} + b_hh
           c_t = σ(f) ∘ c_{t−1} + σ(i) ∘ tanh(g),  h_t = σ(o) ∘ tanh(c_t),  and then W_hr h_t if it is projected
    GRU    r = σ(a_r + u_r),  z = σ(a_z + u_z),  n = tanh(a_n + r ∘ u_n)  with  u = W_hh h_{t−1} + b_hh
           h_t = (1 − z) ∘ n + z ∘ h_{t−1}

One product serves the pre-activations of all steps, and one tap at them delivers δ_t for all t. With δ'_t, the gradient
of W_hh h_{t−1} + b_hh (which is δ_t, but for n of a GRU, where it is r ∘ δ_t),

    g(W_ih) = Σ_t δ_t x_tᵀ,  g(b_ih) = Σ_t δ_t,  g(W_hh) = Σ_t δ'_t h_{t−1}ᵀ,  g(b_hh) = Σ_t δ'_t.

A sequence is held as PyTorch packs it: the rows of all sequences at step 1, those at step 2, and so on; at each step
those sequences that are long enough, the longest first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from persample.sources.backends.contributions import Terms, precise
from persample.sources.backends.fused.axis import Axis
from persample.sources.backends.fused.layout import Layout
from persample.sources.backends.fused.linear import LinearProducts
from persample.sources.backends.fused.op_table import name_of
from persample.sources.backends.fused.owners import Owners
from persample.sources.backends.fused.rules.expanded import copied
from persample.sources.backends.fused.trace import Trace

State = tuple[Tensor, ...]
"""h_t, and c_t of an LSTM."""


@dataclass
class Steps:
    """What the contributions of one direction of a layer need from its steps.

    Attributes:
        before: h_{t−1}.
        reset: r of a GRU.
        unprojected: what W_hr is multiplied with.
    """

    before: list[Tensor] = field(default_factory=list)
    reset: list[Tensor] = field(default_factory=list)
    unprojected: list[Tensor] = field(default_factory=list)


class Weights(NamedTuple):
    """The parameters of one direction of a layer."""

    ih: Tensor
    hh: Tensor
    b_ih: Tensor | None
    b_hh: Tensor | None
    hr: Tensor | None


class Sequences(NamedTuple):
    """Packed sequences.

    Attributes:
        rows: shape `(rows, features)`.
        sizes: how many sequences there are at each step.
        layout: where the samples are in the rows.
    """

    rows: Tensor
    sizes: Sequence[int]
    layout: Layout


def _rnn(activation: Callable[[Tensor], Tensor]) -> Callable[..., State]:
    def step(a: Tensor, u: Tensor, state: State, steps: Steps) -> State:
        return (activation(a + u),)

    return step


def _lstm(a: Tensor, u: Tensor, state: State, steps: Steps) -> State:
    i, f, g, o = (a + u).chunk(4, -1)
    c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru(a: Tensor, u: Tensor, state: State, steps: Steps) -> State:
    (a_r, a_z, a_n), (u_r, u_z, u_n) = a.chunk(3, -1), u.chunk(3, -1)
    r, z = (a_r + u_r).sigmoid(), (a_z + u_z).sigmoid()
    n = (a_n + r * u_n).tanh()
    steps.reset.append(r.detach())
    return (n + z * (state[0] - n),)


Build = Callable[..., LinearProducts | Terms]

_STEPS: Mapping[Any, Callable[..., State]] = {
    torch.rnn_tanh: _rnn(torch.tanh),
    torch.rnn_relu: _rnn(torch.relu),
    torch.lstm: _lstm,
    torch.gru: _gru,
}


class _Layers(NamedTuple):
    """The arguments of a recurrent layer, of whole or of packed sequences, as PyTorch's functions take them."""

    x: Tensor
    sizes: list[int] | None  # of the steps of packed sequences; None if they are whole
    states: tuple[Tensor, ...]
    parameters: Sequence[Tensor]
    biases: bool
    depth: int
    dropout: float
    directions: int
    batch_first: bool

    @staticmethod
    def of(args: tuple[Any, ...]) -> _Layers:
        packed = not isinstance(args[3], bool)
        hx, parameters = args[2 if packed else 1], args[3 if packed else 2]
        biases, depth, dropout, training, bidirectional, *first = args[4 if packed else 3 :]
        return _Layers(
            x=args[0],
            sizes=args[1].tolist() if packed else None,
            states=tuple(hx) if isinstance(hx, tuple | list) else (hx,),
            parameters=parameters,
            biases=bool(biases),
            depth=depth,
            dropout=dropout if training else 0.0,
            directions=2 if bidirectional else 1,
            batch_first=bool(first and first[0]),
        )

    def weights(self, number: int) -> Weights:
        """Return the weights of one direction of one layer."""
        each = len(self.parameters) // (self.depth * self.directions)
        return _weights(self.parameters[number * each : (number + 1) * each], self.biases)


def recurrent(trace: Trace, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """`torch.lstm`, `torch.gru`, `torch.rnn_tanh` and `torch.rnn_relu`, of whole and of packed sequences."""
    layers = _Layers.of(args)
    if trace.expression(layers.x) is not None:
        raise ValueError("its input is computed from parameters")
    layout = trace.layout(layers.x, name_of(func))
    trace.rounds_otherwise = True
    sequences, of_state, axis = _sequences(layers, layout)
    states = [_state(trace, state, of_state, axis) for state in layers.states]
    last = []
    for layer in range(layers.depth):
        outputs = []
        for direction in range(layers.directions):
            n = layer * layers.directions + direction
            state = tuple(s[n] for s in states)
            output, state = _direction(
                trace, _STEPS[func], sequences, state, layers.weights(n), backwards=direction == 1
            )
            outputs.append(output)
            last.append(state)
        rows = torch.cat(outputs, -1) if layers.directions == 2 else outputs[0]
        if layers.dropout and layer < layers.depth - 1:
            shape = (len(sequences.sizes), -1) if layers.sizes is None else (len(rows),)
            rows = F.dropout(rows.view(*shape, rows.shape[-1]), layers.dropout).view_as(rows)
        width = sequences.rows.shape[-1]
        sequences = Sequences(rows, sequences.sizes, sequences.layout.with_features(width, rows.shape[-1]))
    ends = [trace.follow_as(end, of_state.at(axis, end.shape)) for end in map(torch.stack, zip(*last, strict=True))]
    return _outputs(trace, sequences, layers, axis), *ends


def _sequences(layers: _Layers, layout: Layout) -> tuple[Sequences, Layout, Axis]:
    """Return the sequences step by step, and layout and axis of tensors with an entry for each sequence.

    Raises:
        ValueError: the samples are not the sequences.
    """
    if layers.sizes is not None:
        return Sequences(layers.x, layers.sizes, layout), _of_first_rows(layout, layers.sizes[0]), Axis(1)
    time_first = layers.x.transpose(0, 1) if layers.batch_first else layers.x
    at = layout.axis(layers.x.shape)
    if at is None or at.dim != (0 if layers.batch_first else 1):
        raise ValueError("the samples are not in the dimension of the sequences, so the layer mixes them")
    axis = at._replace(dim=1)
    layout = layout.at(axis, time_first.shape)
    return Sequences(time_first.flatten(0, 1), [time_first.shape[1]] * len(time_first), layout), layout, axis


def _outputs(trace: Trace, sequences: Sequences, layers: _Layers, axis: Axis) -> Tensor:
    """Return the outputs of the last layer in the shape of its input, followed."""
    rows = sequences.rows
    result = rows if layers.sizes is not None else rows.view(len(sequences.sizes), -1, rows.shape[-1])
    trace.follow_as(result, sequences.layout)
    if layers.batch_first:
        result = result.transpose(0, 1)
        trace.follow_as(result, sequences.layout.at(axis._replace(dim=0), result.shape))
    return result


def _weights(parameters: Sequence[Tensor], biases: bool) -> Weights:
    ih, hh, *others = parameters
    b_ih, b_hh = (others.pop(0), others.pop(0)) if biases else (None, None)
    return Weights(ih, hh, b_ih, b_hh, others[0] if others else None)


def _state(trace: Trace, state: Tensor, layout: Layout, axis: Axis) -> Tensor:
    """Return the states before the first step, of shape `(layers and directions, sequences, features)`."""
    if trace.expression(state) is not None:
        return copied(trace, state, 3, layout, axis)
    if state in trace.layouts:
        own = trace.layout(state, "A recurrent layer")
        due = layout.at(axis, state.shape)
        if not torch.equal(own.labels(state.shape, state.device), due.labels(state.shape, state.device)):
            raise ValueError("its initial states and its sequences belong to different samples")
    return state


def _of_first_rows(layout: Layout, rows: int) -> Layout:
    """The layout of a tensor with an entry for each packed sequence."""
    if layout.owners is None:
        return layout._replace(outer=1)
    return layout._replace(outer=1, owners=Owners(layout.owners.labels[:rows], layout.batch))


def _direction(
    trace: Trace,
    step: Callable[..., State],
    x: Sequences,
    state: State,
    weights: Weights,
    *,
    backwards: bool,
) -> tuple[Tensor, State]:
    """Return the outputs of all steps, `(rows, features)`, and the last states."""
    steps = Steps()
    a = _pre_activations(trace, x, weights, steps, step is _gru)
    projection = _projection(trace, x, weights, a, steps)
    hh, b_hh, hr = (trace.value(w) for w in (weights.hh, weights.b_hh, weights.hr))
    outputs: list[Tensor] = []
    first = state
    ended: list[State] = []
    state = tuple(s[: x.sizes[-1]] for s in state) if backwards else state
    order = reversed(range(len(x.sizes))) if backwards else range(len(x.sizes))
    a_of, projection_of = a.split(list(x.sizes)), projection.split(list(x.sizes)) if projection is not None else None
    for t in order:
        size, present = x.sizes[t], len(state[0])
        if size > present:  # backwards: sequences that end here begin
            state = tuple(torch.cat([s, begin[present:size]]) for s, begin in zip(state, first, strict=True))
        elif size < present:  # forwards: those that ended before are done
            ended.append(tuple(s[size:] for s in state))
            state = tuple(s[:size] for s in state)
        steps.before.append(state[0].detach())
        state = step(a_of[t], F.linear(state[0], hh, b_hh), state, steps)
        if projection_of is not None:
            steps.unprojected.append(state[0].detach())
            state = (F.linear(state[0], hr) + projection_of[t], *state[1:])
        outputs.append(state[0])
    if backwards:
        outputs.reverse()
        for noted in (steps.before, steps.reset, steps.unprojected):
            noted.reverse()
    ends = [torch.cat(parts) for parts in zip(state, *reversed(ended), strict=True)] if ended else state
    return torch.cat(outputs), tuple(ends)


def _pre_activations(trace: Trace, x: Sequences, weights: Weights, steps: Steps, gated: bool) -> Tensor:
    """Return a_t for all steps, `(rows, gates)`, tapped for all parameters but those of the projection."""
    gates, width = weights.ih.shape
    before, after = x.layout, x.layout.with_features(width, gates)
    before.require_features(width, gates)
    hidden = weights.hh.shape[1]
    of_hidden = x.layout.with_features(width, hidden)

    def delta_of_hidden(delta: Tensor) -> Tensor:
        if gated:
            r = torch.cat(steps.reset).to(delta)
            delta = torch.cat([delta[:, : 2 * r.shape[1]], r * delta[:, 2 * r.shape[1] :]], 1)
        return after.sample_first(delta, gates)

    def for_ih(delta: Tensor, x: Tensor) -> LinearProducts:
        return LinearProducts(after.sample_first(delta, gates), before.sample_first(x, width))

    def for_b_ih(delta: Tensor, x: Tensor) -> Terms:
        return Terms(after.sample_first(delta, gates))

    def for_hh(delta: Tensor, x: Tensor) -> LinearProducts:
        h = precise(torch.cat(steps.before))
        return LinearProducts(delta_of_hidden(delta), of_hidden.sample_first(h, hidden))

    def for_b_hh(delta: Tensor, x: Tensor) -> Terms:
        return Terms(delta_of_hidden(delta))

    a = F.linear(x.rows, trace.value(weights.ih), trace.value(weights.b_ih))
    uses: list[tuple[Any, Build]] = [
        (weights.ih, for_ih),
        (weights.b_ih, for_b_ih),
        (weights.hh, for_hh),
        (weights.b_hh, for_b_hh),
    ]
    return trace.tap(a, after, uses, (x.rows,))


def _projection(trace: Trace, x: Sequences, weights: Weights, a: Tensor, steps: Steps) -> Tensor | None:
    """Return zeros that are added to the projected states of all steps, `(rows, features)`, tapped for W_hr."""
    if weights.hr is None:
        return None
    features, hidden = weights.hr.shape
    width = x.rows.shape[1]
    after, before = x.layout.with_features(width, features), x.layout.with_features(width, hidden)

    def for_hr(delta: Tensor) -> LinearProducts:
        h = precise(torch.cat(steps.unprojected))
        return LinearProducts(after.sample_first(delta, features), before.sample_first(h, hidden))

    return trace.tap(a.new_zeros(len(a), features), after, [(weights.hr, for_hr)])


def lstm_cell(
    trace: Trace,
    input: Tensor,
    hx: Sequence[Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> State:
    """`torch.lstm_cell`."""
    with trace:
        h, c = _lstm(F.linear(input, w_ih, b_ih), F.linear(hx[0], w_hh, b_hh), tuple(hx), Steps())
        return h, c


def _cell(step: Callable[..., State]) -> Callable[..., Tensor]:
    def rule(
        trace: Trace,
        input: Tensor,
        hx: Tensor,
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor | None = None,
        b_hh: Tensor | None = None,
    ) -> Tensor:
        with trace:
            return step(F.linear(input, w_ih, b_ih), F.linear(hx, w_hh, b_hh), (hx,), Steps())[0]

    return rule


layers = tuple(_STEPS)
cells: Mapping[Any, Callable[..., Any]] = {
    torch.lstm_cell: lstm_cell,
    torch.gru_cell: _cell(_gru),
    torch.rnn_tanh_cell: _cell(_STEPS[torch.rnn_tanh]),
    torch.rnn_relu_cell: _cell(_STEPS[torch.rnn_relu]),
}
