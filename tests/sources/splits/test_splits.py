"""Batches whose samples are not in dim 0 of every tensor: shared tensors, other dims, lists, packed ones, objects."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence
from torch.nn.utils.rnn import pack_sequence as pack_on_cpu

import persample
from persample import batched, losses, one_per_sample, shared
from persample.errors import BatchError, UnsupportedModelError, UsageError
from persample.sources.batch import arguments, as_batch

EVERY = frozenset({"loop", "vjp", "fused", "vmap", "hooks", "backpack", "opacus"})
BY_OPERATIONS = frozenset({"loop", "vjp", "fused", "vmap"})


def pack_sequence(entries: list[Tensor], enforce_sorted: bool = True) -> PackedSequence:
    """As PyTorch's, which wants the lengths on the CPU but makes them on the default device."""
    with torch.device("cpu"):
        return pack_on_cpu(entries, enforce_sorted)


class Net(nn.Module):
    """A function of parts and inputs."""

    def __init__(self, function: Callable[..., Any], **parts: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


@dataclass
class Situation:
    """A model, a batch as persample gets it, and the same as the plain model gets it for single samples.

    Attributes:
        alone: the arguments and targets of sample i, by plain indexing.
        exact: the backends that must serve it; others may refuse it in words.
        block: the same for passes that the user runs; None if it is the same.
    """

    model: nn.Module
    loss: Callable[[Any, Any], Tensor]
    inputs: Any
    targets: Any
    alone: Callable[[int], tuple[tuple[Any, ...], Any]]
    exact: frozenset[str] = EVERY
    block: frozenset[str] | None = None


SIZE = 4


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def labels(classes: int = 4) -> Tensor:
    return torch.randint(classes, (SIZE,))


def mask_of_attention() -> Situation:
    def attend(model: Any, x: Tensor, mask: Tensor) -> Tensor:
        return model.attention(x, x, x, attn_mask=mask, need_weights=False)[0].mean(1)

    x, y, mask = normal(SIZE, 5, 4), labels(), torch.ones(5, 5, dtype=torch.bool).triu(1)
    model = Net(attend, attention=nn.MultiheadAttention(4, 2, batch_first=True))
    return Situation(
        model, losses.cross_entropy, (x, shared(mask)), y, lambda i: ((x[i : i + 1], mask), y[i : i + 1]), BY_OPERATIONS
    )


def adjacency(nodes: int = 5) -> Situation:
    x, y, edges = normal(SIZE, nodes, 4), labels(), torch.rand(nodes, nodes, dtype=torch.float64)
    model = Net(lambda model, x, edges: (edges @ model.inner(x)).mean(1), inner=nn.Linear(4, 4))
    return Situation(
        model, losses.cross_entropy, (x, shared(edges)), y, lambda i: ((x[i : i + 1], edges), y[i : i + 1])
    )


def sparse_adjacency() -> Situation:
    situation = adjacency()
    x, edges = situation.inputs[0], torch.eye(5, dtype=torch.float64).to_sparse()
    model = Net(lambda model, x, edges: (edges.to_dense() @ model.inner(x)).mean(1), inner=nn.Linear(4, 4))
    y = situation.targets
    return dataclasses.replace(
        situation, model=model, inputs=(x, shared(edges)), alone=lambda i: ((x[i : i + 1], edges), y[i : i + 1])
    )


def positions() -> Situation:
    x, y, places = normal(SIZE, 5, 4), labels(), torch.arange(5)[None]
    model = Net(lambda model, x, places: (x * model.table(places)).mean(1), table=nn.Embedding(9, 4))
    return Situation(
        model,
        losses.cross_entropy,
        {"x": x, "places": shared(places)},
        y,
        lambda i: ((x[i : i + 1], places), y[i : i + 1]),
        BY_OPERATIONS,
    )


def state_with_layers_first() -> Situation:
    x, y, state = normal(SIZE, 5, 4), labels(), normal(1, SIZE, 4)
    model = Net(lambda model, x, state: model.inner(x, state)[0][:, -1], inner=nn.GRU(4, 4, batch_first=True))
    return Situation(
        model,
        losses.cross_entropy,
        (x, batched(state, dim=1)),
        y,
        lambda i: ((x[i : i + 1], state[:, i : i + 1]), y[i : i + 1]),
        BY_OPERATIONS,
    )


def states_of_lstm(layers: int = 2) -> Situation:
    x, y = normal(5, SIZE, 3), labels()
    states = normal(layers, SIZE, 4), normal(layers, SIZE, 4)
    model = Net(lambda model, x, states: model.inner(x, states)[0][-1], inner=nn.LSTM(3, 4, layers))
    return Situation(
        model,
        losses.cross_entropy,
        (batched(x, dim=1), batched(states, dim=-2)),
        y,
        lambda i: ((x[:, i : i + 1], tuple(s[:, i : i + 1] for s in states)), y[i : i + 1]),
        BY_OPERATIONS,
    )


def time_first(steps: int = 5) -> Situation:
    x, y = normal(steps, SIZE, 3), torch.randint(4, (steps, SIZE))

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape).sum(0)

    model = Net(lambda model, x: model.inner(x.transpose(0, 1)).transpose(0, 1), inner=nn.Linear(3, 4))
    return Situation(
        model,
        loss,
        batched(x, dim=1),
        batched(y, dim=-1),
        lambda i: ((x[:, i : i + 1],), y[:, i : i + 1]),
        block=frozenset({"fused"}),  # dim 0 of the outputs is not the sample
    )


def nested() -> Situation:
    x, y, scale, other = normal(SIZE, 3), labels(), normal(3), normal(3, SIZE)

    def forward(model: Any, pair: Any, flag: bool) -> Tensor:
        first, rest = pair
        return model.inner(first * rest["scale"] + rest["other"].T) if flag else first

    def pair(x: Tensor, scale: Any, other: Any) -> Any:
        return x, {"scale": scale, "other": other, "no": None}

    weights = torch.rand(4, dtype=torch.float64)

    def loss(outputs: Tensor, targets: Any) -> Tensor:
        return F.cross_entropy(outputs, targets["y"], weight=targets["weights"][0], reduction="none")

    return Situation(
        Net(forward, inner=nn.Linear(3, 4)),
        loss,
        (pair(x, shared(scale), batched(other, dim=1)), True),
        {"y": y, "weights": (shared(weights),)},
        lambda i: (
            (pair(x[i : i + 1], scale, other[:, i : i + 1]), True),
            {"y": y[i : i + 1], "weights": (weights,)},
        ),
    )


def means_of_sets(model: Any, sets: list[Tensor]) -> Tensor:
    return torch.stack([model.inner(entry).tanh().mean(0) for entry in sets])


Wrap = Callable[[list[Tensor]], Any]


def as_it_is(entries: list[Tensor]) -> Any:
    return entries


def in_block(lengths: tuple[int, ...], wrap: Wrap) -> frozenset[str] | None:
    """Without targets, nobody can tell whether tensors of one length are samples."""
    return frozenset() if len(set(lengths)) == 1 and wrap is as_it_is else None


def sets(lengths: tuple[int, ...] = (5, 2, 3, 1), wrap: Wrap = as_it_is) -> Situation:
    entries, y = [normal(n, 3) for n in lengths], labels()
    return Situation(
        Net(means_of_sets, inner=nn.Linear(3, 4)),
        losses.cross_entropy,
        (wrap(entries),),
        y,
        lambda i: ((entries[i : i + 1],), y[i : i + 1]),
        BY_OPERATIONS if len(set(lengths)) == 1 else frozenset({"loop", "vjp", "fused"}),
        in_block(lengths, wrap),
    )


def sums_of_sets() -> Situation:
    """A number of a whole set enters a layer; nobody but its sample is in it."""

    def forward(model: Any, sets: list[Tensor]) -> Tensor:
        numbers = [torch.stack([entry.square().sum(), entry.max(), entry.norm() / len(entry)]) for entry in sets]
        return torch.stack([model.inner(three).tanh() for three in numbers])

    entries, y = [normal(n, 3) for n in (5, 2, 3, 1)], labels()
    return Situation(
        Net(forward, inner=nn.Linear(3, 4)),
        losses.cross_entropy,
        (entries,),
        y,
        lambda i: ((entries[i : i + 1],), y[i : i + 1]),
        frozenset({"loop", "vjp", "fused"}),
    )


def images(wrap: Wrap = as_it_is) -> Situation:
    entries, y = [normal(3, 2) for _ in range(SIZE)], labels()
    model = Net(lambda model, images: model.inner(torch.stack(images).flatten(1)), inner=nn.Linear(6, 4))
    return Situation(
        model,
        losses.cross_entropy,
        (wrap(entries),),
        y,
        lambda i: ((entries[i : i + 1],), y[i : i + 1]),
        BY_OPERATIONS,
        in_block((3,), wrap),
    )


def detection(boxes: tuple[int, ...] = (1, 3, 2, 1)) -> Situation:
    x = normal(SIZE, 3)
    targets = [{"boxes": normal(n, 3), "id": torch.tensor(i)} for i, n in enumerate(boxes)]

    def loss(outputs: Tensor, targets: list[Any]) -> Tensor:
        return torch.stack([(o - t["boxes"]).square().sum() for o, t in zip(outputs, targets, strict=True)])

    exact = EVERY if len(set(boxes)) == 1 else EVERY - {"vmap"}
    return Situation(nn.Linear(3, 3), loss, x, targets, lambda i: ((x[i : i + 1],), targets[i : i + 1]), exact, EVERY)


def lengths_as_a_list() -> Situation:
    x, y, lengths = normal(SIZE, 5, 3), labels(), [5, 1, 3, 2]

    def forward(model: Any, x: Tensor, lengths: list[int]) -> Tensor:
        return torch.stack([model.inner(x[i, :n]).mean(0) for i, n in enumerate(lengths)])

    return Situation(
        Net(forward, inner=nn.Linear(3, 4)),
        losses.cross_entropy,
        (x, lengths),
        y,
        lambda i: ((x[i : i + 1], lengths[i : i + 1]), y[i : i + 1]),
        frozenset({"loop", "vjp", "fused"}),
    )


def packed() -> Situation:
    entries, y = [normal(n, 3) for n in (2, 5, 1, 3)], labels()
    model = Net(lambda model, p: model.inner(p)[1][-1], inner=nn.GRU(3, 4))
    return Situation(
        model,
        losses.cross_entropy,
        (pack_sequence(entries, enforce_sorted=False),),
        y,
        lambda i: ((pack_sequence(entries[i : i + 1]),), y[i : i + 1]),
        frozenset({"loop", "vjp", "fused"}),
    )


def packed_with_targets_of_steps() -> Situation:
    entries, marks = [normal(n, 3) for n in (2, 5, 1, 3)], [torch.randint(4, (n,)) for n in (2, 5, 1, 3)]
    inputs, targets = (pack_sequence(entries, enforce_sorted=False) for entries in (entries, marks))

    def forward(model: Any, p: Any) -> Any:
        return p._replace(data=model.inner(p.data))

    def loss(outputs: Any, targets: Tensor) -> Tensor:
        steps = F.cross_entropy(outputs.data, targets, reduction="none")
        return pad_packed_sequence(outputs._replace(data=steps), batch_first=True)[0].sum(1)

    return Situation(
        Net(forward, inner=nn.Linear(3, 4)),
        loss,
        (inputs,),
        targets.data,
        lambda i: ((pack_sequence(entries[i : i + 1]),), marks[i]),
        frozenset({"loop", "vjp", "fused"}),
        frozenset({"fused"}),
    )


@dataclass
class Graph:
    nodes: Tensor
    edges: Tensor | None
    name: str = "graph"


def object_with_fields(edges: bool = True) -> Situation:
    x, y, ones = normal(SIZE, 5, 3), labels(), torch.eye(5, dtype=torch.float64)
    model = Net(lambda model, g: (g.edges @ model.inner(g.nodes)).mean(1), inner=nn.Linear(3, 4))
    return Situation(
        model,
        losses.cross_entropy,
        (Graph(x, shared(ones)),),  # type: ignore[arg-type]
        y,
        lambda i: ((Graph(x[i : i + 1], ones),), y[i : i + 1]),
    )


def mapping_that_is_no_dict() -> Situation:
    x, y = normal(SIZE, 3), labels()
    model = Net(lambda model, features: model.inner(features["x"]), inner=nn.Linear(3, 4))
    return Situation(
        model,
        losses.cross_entropy,
        (collections.UserDict(x=x, size=3),),
        y,
        lambda i: ((collections.UserDict(x=x[i : i + 1]),), y[i : i + 1]),
    )


class OneArgument(nn.Module):
    """A model that takes one tuple, or one dict."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 4)

    def forward(self, both: Any) -> Any:
        x, scale = both.values() if isinstance(both, dict) else both
        return self.inner(x * scale)


def one_tuple() -> Situation:
    x, scale, y = normal(SIZE, 3), normal(SIZE, 1), labels()
    return Situation(
        OneArgument(),
        losses.cross_entropy,
        (x, scale),
        y,
        lambda i: (((x[i : i + 1], scale[i : i + 1]),), y[i : i + 1]),
    )


def one_dict() -> Situation:
    x, scale, y = normal(SIZE, 3), normal(1), labels()
    return Situation(
        OneArgument(),
        losses.cross_entropy,
        {"x": x, "scale": shared(scale)},
        y,
        lambda i: (({"x": x[i : i + 1], "scale": scale},), y[i : i + 1]),
    )


def numbers(form: Callable[[list[int]], Any]) -> Situation:
    x, y = normal(SIZE, 3), [3, 0, 2, 1]
    return Situation(
        nn.Linear(3, 4), losses.cross_entropy, x, form(y), lambda i: ((x[i : i + 1],), torch.tensor(y[i : i + 1]))
    )


SITUATIONS: dict[str, Callable[[], Situation]] = {
    "mask of attention": mask_of_attention,
    "adjacency": adjacency,
    "adjacency as large as the batch": lambda: adjacency(SIZE),
    "sparse adjacency": sparse_adjacency,
    "positions": positions,
    "state with layers first": state_with_layers_first,
    "states of an LSTM": states_of_lstm,
    "states of as many layers as samples": lambda: states_of_lstm(SIZE),
    "time first": time_first,
    "as many steps as samples": lambda: time_first(SIZE),
    "nested": nested,
    "sets": sets,
    "sets of one length": lambda: sets((3, 3, 3, 3)),
    "sets as large as the batch, said": lambda: sets((4, 4, 4, 4), one_per_sample),
    "sets of one length, said": lambda: sets((3, 3, 3, 3), one_per_sample),
    "sums of sets": sums_of_sets,
    "images": images,
    "images, said": lambda: images(one_per_sample),
    "detection": detection,
    "as many boxes as samples": lambda: detection((4, 4, 4, 4)),
    "lengths as a list": lengths_as_a_list,
    "packed": packed,
    "packed, with targets of steps": packed_with_targets_of_steps,
    "object with fields": object_with_fields,
    "mapping that is no dict": mapping_that_is_no_dict,
    "one tuple": one_tuple,
    "one dict": one_dict,
    "targets as a list of integers": lambda: numbers(list),
    "targets as a list of tensors": lambda: numbers(lambda y: [torch.tensor(label) for label in y]),
    "targets as an array": lambda: numbers(np.array),
    "targets as a list of NumPy numbers": lambda: numbers(lambda y: list(np.array(y))),
}


@pytest.fixture(params=SITUATIONS)
def situation(request: pytest.FixtureRequest) -> Situation:
    torch.manual_seed(0)
    found = SITUATIONS[request.param]()
    found.model.double()
    return found


def truth(situation: Situation) -> dict[str, Tensor]:
    """The gradients of single samples, each of which goes alone through the plain model."""
    rows = []
    names = [name for name, _ in situation.model.named_parameters()]
    for i in range(SIZE):
        args, target = situation.alone(i)
        (loss,) = situation.loss(situation.model(*args), target)
        rows.append(torch.autograd.grad(loss, list(situation.model.parameters())))
    return {name: torch.stack(same) for name, same in zip(names, zip(*rows, strict=True), strict=True)}


def assert_moments(moments: persample.Moments, gradients: dict[str, Tensor]) -> None:
    close = {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(dict(moments.mean), {n: g.mean(0) for n, g in gradients.items()}, **close)
    torch.testing.assert_close(
        dict(moments.second_moment), {n: g.square().mean(0) for n, g in gradients.items()}, **close
    )


@pytest.fixture(autouse=True)
def needs_sparse_tensors_in_vmap(request: pytest.FixtureRequest) -> None:
    if torch.__version__ < "2.13" and "sparse adjacency-vmap" in request.node.name:
        pytest.skip("torch.func of an older PyTorch takes no sparse tensors")


@pytest.mark.parametrize("check", ["first", "never"])
def test_exact_or_refused(backend: str, situation: Situation, check: Any, no_trace: Any) -> None:
    gradients = truth(situation)
    source = persample.make_source(backend, situation.model, situation.loss, check=check)
    if backend.partition(" ")[0] not in situation.exact:
        with no_trace(situation.model), pytest.raises(UnsupportedModelError, match=r"[uU]se (another )?backend"):
            source.moments(situation.inputs, situation.targets)
        return
    with no_trace(situation.model):
        rows = source.per_sample(situation.inputs, situation.targets)
        moments = source.moments(situation.inputs, situation.targets)
    torch.testing.assert_close(rows, gradients, rtol=1e-9, atol=1e-12)
    assert_moments(moments, gradients)


def test_in_the_block_of_the_user(backend: str, situation: Situation) -> None:
    gradients, inputs, model = truth(situation), situation.inputs, situation.model
    targets = as_batch(inputs, situation.targets, model).targets  # as the loss takes them
    args, kwargs = arguments(inputs, model)
    source = persample.make_source(backend, model, situation.loss)

    def run() -> persample.Moments:
        with source.recording("sum") as recorded:
            situation.loss(model(*args, **kwargs), targets).sum().backward()
        return recorded.moments()

    if backend.partition(" ")[0] in (situation.exact if situation.block is None else situation.block):
        assert_moments(run(), gradients)
    else:
        with pytest.raises((UnsupportedModelError, UsageError)):
            run()


# What is refused, and what errors say.


def refusal(inputs: Any, targets: Any = None, model: nn.Module | None = None) -> str:
    with pytest.raises(BatchError) as raised:
        as_batch(inputs, targets, model)
    return str(raised.value)


@pytest.mark.parametrize(
    ("inputs", "targets", "named"),
    [
        ((torch.zeros(4, 5), torch.zeros(5, 5)), None, "inputs[0] has 4 samples, but inputs[1] has 5"),
        ({"x": torch.zeros(4, 5), "mask": torch.zeros(1, 5)}, None, "inputs['mask'] has 1"),
        ((torch.zeros(11), torch.zeros(4)), None, "inputs[1] has 4"),
        (torch.zeros(4, 5), torch.zeros(9), "inputs has 4 samples, but targets has 9"),
        (torch.zeros(4, 5), [1, 2, 3], "inputs has 4 samples, but targets has 3"),
        (torch.zeros(4, 5), [torch.zeros(2), torch.zeros(3)], "inputs has 4 samples, but targets has 2"),
        (torch.zeros(4, 5), [{"boxes": torch.zeros(2)}] * 3, "inputs has 4 samples, but targets has 3"),
        ((torch.zeros(4, 5), batched(torch.zeros(4, 5), dim=1)), None, "inputs[1] has 5"),
        ((torch.zeros(4, 5), one_per_sample([1, 2])), None, "inputs[1] has 2"),
        ((torch.zeros(4, 5), pack_sequence([torch.zeros(2, 3)])), None, "inputs[1] has 1"),
        ((Graph(torch.zeros(4, 5), torch.zeros(2, 9)),), None, "inputs['edges'] has 2"),
    ],
)
def test_other_lengths_are_refused_by_name(inputs: Any, targets: Any, named: str) -> None:
    said = refusal(inputs, targets)
    assert named in said or named.replace("inputs[", "inputs[0][") in said
    for way in ("persample.shared(tensor)", "persample.batched(tensor, dim=1)", "padded", "a list with one tensor"):
        assert way in said


class Opaque:
    def __init__(self, held: Any) -> None:
        self.store = {"held": [held]}


@pytest.mark.parametrize("held", [torch.zeros(4), Opaque(torch.zeros(4))])
def test_objects_that_cannot_be_split_are_refused_by_name(held: Any) -> None:
    said = refusal((torch.zeros(4, 3), Opaque(held)))
    assert "inputs[1] is of type Opaque, which holds tensors" in said
    assert "persample.shared(...)" in said
    assert as_batch((torch.zeros(4, 3), shared(Opaque(held))), None).take([1]).args[1].store
    assert as_batch((torch.zeros(2, 3), [Opaque(held), Opaque(3)]), None).take([1]).args[1][0].store == {"held": [3]}
    assert as_batch((torch.zeros(4, 3), Opaque("nothing")), None).size == 4


def test_what_wrappers_do_not_take() -> None:
    x = torch.zeros(4, 3)
    for wrong, said in (
        (lambda: batched(x, dim=2), "no such"),
        (lambda: batched(x, dim="1"), "must be an integer"),  # type: ignore[arg-type]
        (lambda: batched({"flag": True}, dim=1), "no tensor"),
        (lambda: one_per_sample(x), "pass a list"),  # type: ignore[arg-type]
        (lambda: shared((x, batched(x, dim=1))), "use one of them"),
        (lambda: batched(shared(x), dim=0), "use one of them"),
    ):
        with pytest.raises(BatchError, match=said):
            wrong()
    assert "no tensor" in refusal(shared(x))
    assert "of type list" in refusal([x])
    assert "of type Graph" in refusal(Graph(x, None))


def test_what_lists_mean() -> None:
    x = torch.zeros(3, 2)
    for inputs, of_second in (
        ((x, [torch.ones(3), torch.ones(3, 2)]), [torch.ones(1), torch.ones(1, 2)]),  # dim 0 is the sample
        ((x, [torch.ones(3), torch.ones(3), torch.ones(3)]), [torch.ones(1)] * 3),  # both: the same as ever
        ((x, one_per_sample([torch.zeros(3), torch.ones(3), torch.zeros(3)])), [torch.ones(3)]),
        ((x, [torch.zeros(3), torch.ones(2), torch.zeros(3)]), [torch.ones(2)]),
        ((x, [{"a": torch.zeros(3)}, {"a": torch.ones(3)}, {}]), [{"a": torch.ones(3)}]),
        ((x, ["a", "b", "c"]), ["b"]),
        ((x, ["a", "b"]), ["a", "b"]),
        ((x, ("a", "b", "c")), ("a", "b", "c")),
        ((x, shared(["a", "b", "c"])), ["a", "b", "c"]),
        ((x, {"sizes": [4, 5, 6]}), {"sizes": [5]}),
    ):
        assert repr(as_batch(inputs, None).take([1]).args[1]) == repr(of_second)
    assert as_batch(([torch.zeros(5), torch.zeros(2)],), None).size == 2
    assert as_batch(([torch.zeros(5), torch.zeros(5, 2)],), None).size == 5


def test_errors_name_what_may_be_no_samples() -> None:
    def said(model: nn.Module, inputs: Any) -> str:
        with pytest.raises(UnsupportedModelError) as raised:
            persample.make_source("fused", model.double(), losses.cross_entropy).moments(inputs, labels())
        return str(raised.value)

    square = Net(lambda model, x, edges: (edges @ model.inner(x)).mean(1), inner=nn.Linear(4, 4))
    text = said(square, (normal(SIZE, SIZE, 4), torch.rand(SIZE, SIZE).double()))
    assert "Dim 0 of inputs[1], of shape (4, 4), was taken for the samples" in text
    text = said(Net(means_of_sets, inner=nn.Linear(3, 4)), ([normal(SIZE, 3) for _ in range(SIZE)],))
    assert "persample.one_per_sample(list)" in text
    text = said(
        Net(lambda model, x, sizes: model.inner(x) * sizes[0], inner=nn.Linear(3, 4)), (normal(SIZE, 3), [1, 2, 3, 4])
    )
    assert "pass a tuple, or persample.shared(list)" in text


@pytest.mark.parametrize("backend", ["fused"])
def test_a_tensor_that_stands_for_several_samples_is_refused(backend: str) -> None:
    x = normal(2, 3)
    model = Net(means_of_sets, inner=nn.Linear(3, 4)).double()
    source = persample.make_source(backend, model, losses.cross_entropy)
    with pytest.raises(UnsupportedModelError, match=r"clone\(\)"), source.recording():
        model([x, x, normal(3, 3)])
    with pytest.raises(UnsupportedModelError, match=r"clone\(\)"):
        source.per_sample(([x, x, normal(3, 3)],), torch.tensor([1, 1, 2]))
    rows = source.per_sample(([x, x.clone(), normal(3, 3)],), torch.tensor([1, 1, 2]))
    torch.testing.assert_close(rows["inner.weight"][0], rows["inner.weight"][1])


def test_what_the_batch_keeps() -> None:
    inputs = ({"x": torch.zeros(3, 2), "state": batched(torch.zeros(1, 3), dim=1), "mask": shared(torch.ones(2, 2))},)
    batch = as_batch(inputs, [0, 1, 2])
    assert batch.double().take([2, 0]).args[0]["state"].shape == (1, 2)
    assert batch.double().args[0]["mask"].dtype == torch.float64
    assert batch.with_inputs(*batch.inputs()).take(slice(0, 2)).size == 2
    assert batch.kind() == as_batch(inputs, [2, 1, 0]).kind()
    longer = ({**inputs[0], "mask": shared(torch.ones(9, 9))},)
    assert batch.kind() == as_batch(longer, [2, 1, 0]).kind()
    assert batch.kind() != as_batch(({**inputs[0], "mask": torch.ones(3, 2)},), [2, 1, 0]).kind()
    assert as_batch(([torch.zeros(5), torch.zeros(2)],), None).kind() == (
        as_batch(([torch.zeros(1), torch.zeros(2), torch.zeros(3)],), None).kind()
    )


@pytest.mark.parametrize(
    "name", ["object with fields", "mapping that is no dict", "sets", "targets as an array", "one dict"]
)
def test_in_the_checks_of_a_model(name: str) -> None:
    torch.manual_seed(0)
    situation = SITUATIONS[name]()
    single, inputs = situation.model.float(), persample.sources.splits.tree.map_tensors(Tensor.float, situation.inputs)
    if name == "object with fields":
        inputs = (Graph(situation.inputs[0].nodes.float(), shared(torch.eye(5))),)  # type: ignore[arg-type]
    if name == "mapping that is no dict":
        inputs = (collections.UserDict(x=situation.inputs[0]["x"].float()),)
    found = persample.crosscheck(single, situation.loss, inputs, situation.targets, backends=["fused", "vmap"])
    assert found[0].agrees, found[0]
    assert found[1].agrees or name == "sets"
    assert not persample.explain(single, inputs, situation.targets, loss_fn=situation.loss).refusals
