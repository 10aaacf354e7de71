"""A graph of Dynamo's, run under the capture of this backend and written down as a flat list of ATen operations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor
from torch.fx import GraphModule

from persample.sources.backends.fused.known_values import WithKnownValues
from persample.sources.backends.fused.replay.refusals import refuse_operation
from persample.sources.backends.fused.replay.tidying import tidy
from persample.sources.model.batch_norm_nodes import read_right

#: Computes what is wanted, from losses and operands: the tensors of it.
Compute = Callable[[Callable[[], Tensor], Sequence[Tensor]], Sequence[Tensor]]


def flat_graph(
    graph: GraphModule,
    examples: Sequence[Tensor],
    trained: Sequence[int],
    compute: Compute,
    constants: Mapping[int, Tensor],
) -> tuple[GraphModule, dict[int, Tensor]]:
    """Return the operations of a whole step, without autograd, and the constants whose values they go by.

    Args:
        graph: forward pass and loss, a function of the first operands.
        examples: all operands.
        trained: the numbers of those that are parameters of which gradients are wanted.
        compute: computes what is wanted.
        constants: those operands of the graph whose values may be looked at, by their number.

    Raises:
        NotReplayableError: the step depends on values, or on what is not in the graph.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    taken = sum(node.op == "placeholder" for node in graph.graph.nodes)
    interpreter = WithKnownValues(graph, constants)

    def step(*inputs: Tensor) -> list[Tensor]:
        operands = list(inputs)
        for i in trained:
            operands[i] = inputs[i].detach().requires_grad_()

        def losses() -> Tensor:
            (found,) = interpreter.run(*operands[:taken])
            read_right([found])
            return found  # type: ignore[no-any-return]

        return list(compute(losses, operands))

    recorded = make_fx(step, tracing_mode="fake")(*[t.detach() for t in examples])
    for node in recorded.graph.nodes:
        refuse_operation(node)
    tidy(recorded)
    return recorded, {number: constants[number].clone() for number in interpreter.looked_at}
