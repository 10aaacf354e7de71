"""Gradients behind batch and instance norm, whatever their layout in memory: PyTorch's own are wrong for some."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import persample
from persample.errors import UnsupportedModelError
from persample.sources.model.batch_norm_nodes import read_right


def loss_fn(outputs: Tensor, targets: Any = None) -> Tensor:
    return outputs.sin().flatten(1).sum(1)


def tokens(h: Tensor) -> Tensor:
    return h.flatten(2).transpose(1, 2).contiguous()


def tokens_first(h: Tensor) -> Tensor:
    return h.flatten(2).permute(2, 0, 1)


def from_tokens_first(h: Tensor) -> Tensor:
    return tokens_first(h).contiguous().permute(1, 2, 0).unflatten(2, h.shape[2:])


def squeezed(h: Tensor) -> Tensor:
    return h.squeeze(-1).transpose(1, 2) if h.shape[-1] == 1 else tokens(h)


READERS = [tokens, tokens_first, squeezed]
WRITERS: list[Callable[[Tensor], Tensor]] = [lambda h: h, from_tokens_first]


def batch_norm(dimensions: int, **options: Any) -> nn.Module:
    return [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d][dimensions - 1](4, **options).eval()


def instance_norm(dimensions: int, **options: Any) -> nn.Module:
    return [nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d][dimensions - 1](4, **options)


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batch norm": batch_norm,
    "frozen batch norm": lambda dimensions: persample.FrozenBatchNorm(4),
    "batch norm without scale": lambda dimensions: batch_norm(dimensions, affine=False),
    "instance norm": lambda dimensions: instance_norm(dimensions, affine=True),
    "instance norm without scale": instance_norm,
    "instance norm with statistics": lambda d: instance_norm(d, affine=True, track_running_stats=True).eval(),
}


class Hybrid(nn.Module):
    """A convolution and a norm, whose result is read as tokens by a linear layer."""

    def __init__(self, norm: nn.Module, dimensions: int, write: Any, read: Any) -> None:
        super().__init__()
        self.conv = [nn.Conv1d, nn.Conv2d, nn.Conv3d][dimensions - 1](2, 4, 1)
        self.norm, self.head = norm, nn.Linear(4, 3)
        self.write, self.read = write, read
        if getattr(norm, "running_mean", None) is not None:
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
        if norm.weight is not None:
            nn.init.normal_(norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.read(self.normalized(self.write(self.conv(x)))))
        return out.transpose(0, 1) if self.read is tokens_first else out

    def normalized(self, h: Tensor) -> Tensor:
        result: Tensor = self.norm(h)
        return result


class Functional(Hybrid):
    def normalized(self, h: Tensor) -> Tensor:
        norm = self.norm
        return F.batch_norm(h, norm.running_mean, norm.running_var, norm.weight, norm.bias)


class ByHand(Hybrid):
    """The same in single operations, of which none has a kernel of its own."""

    def normalized(self, h: Tensor) -> Tensor:
        norm, positions = self.norm, tuple(range(2, h.dim()))
        by_channel = (1, -1) + (1,) * len(positions)
        if norm.running_mean is None:
            mean, variance = h.mean(positions, keepdim=True), h.var(positions, correction=0, keepdim=True)
        else:
            mean, variance = norm.running_mean.view(by_channel), norm.running_var.view(by_channel)
        h = (h - mean) / (variance + norm.eps).sqrt()
        return h if norm.weight is None else h * norm.weight.view(by_channel) + norm.bias.view(by_channel)


@pytest.mark.parametrize("name", [*NORMS, "functional batch norm"])
@pytest.mark.parametrize("positions", [(5,), (3, 5), (5, 1), (2, 1, 3)], ids=str)
def test_gradients_do_not_depend_on_the_layout(
    backend: str, name: str, positions: tuple[int, ...], per_sample_truth: Any
) -> None:
    served = False
    for read in READERS:
        for write in WRITERS:
            for size in (1, 4):
                torch.manual_seed(size)
                norm = NORMS.get(name, batch_norm)(len(positions))
                kind = Functional if name.startswith("functional") else Hybrid
                model = kind(norm, len(positions), write, read).double()
                by_hand = ByHand(norm, len(positions), write, read).double()
                by_hand.load_state_dict(model.state_dict())
                x = torch.randn(size, 2, *positions).double()
                truth = per_sample_truth(by_hand, loss_fn, x, None)
                try:
                    moments = persample.make_source(backend, model, loss_fn, check="never").moments(x, None)
                    gradients = persample.make_source(backend, model, loss_fn).per_sample(x, None)
                except UnsupportedModelError:
                    assert backend.partition(" ")[0] in ("hooks", "vmap", "backpack", "opacus")
                    continue
                served = True
                torch.testing.assert_close(gradients, truth.gradients, rtol=1e-8, atol=1e-10)
                mean = {key: g.mean(0) for key, g in truth.gradients.items()}
                torch.testing.assert_close(moments.mean, mean, rtol=1e-8, atol=1e-10)
                squares = {key: g.square().mean(0) for key, g in truth.gradients.items()}
                torch.testing.assert_close(moments.second_moment, squares, rtol=1e-8, atol=1e-10)
    assert served or backend not in ("fused", "loop")


@pytest.mark.parametrize("size", [1, 4])
def test_in_a_pass_of_the_user(backend: str, size: int) -> None:
    torch.manual_seed(0)
    model = Hybrid(instance_norm(2), 2, from_tokens_first, tokens).double()
    by_hand = ByHand(model.norm, 2, from_tokens_first, tokens).double()
    by_hand.load_state_dict(model.state_dict())
    x = torch.randn(size, 2, 3, 5).double()
    optimizer = persample.VOGN(model, loss_fn, data_size=10, hess_init=1e12, backend=backend)
    with optimizer.sampled_params(train=True):
        by_hand.load_state_dict(model.state_dict())
        loss_fn(model(x)).mean().backward()
        loss_fn(by_hand(x)).mean().backward()
        gradients = [p.grad.clone() for p in model.parameters()]
    torch.testing.assert_close(gradients, [p.grad for p in by_hand.parameters()], rtol=1e-8, atol=1e-10)


@pytest.mark.skipif(torch.__version__ < "2.13", reason="an older PyTorch does not tell how the input lies")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_what_lies_as_its_kernel_reads_it_is_not_copied(layout: torch.memory_format) -> None:
    x = torch.randn(1, 4, 3, 5).contiguous(memory_format=layout).requires_grad_()
    arrived: list[Tensor] = []
    result = nn.BatchNorm2d(4).eval()(x)
    read_right([result])
    result.grad_fn.register_prehook(lambda deltas: arrived.append(deltas[0]))
    delta = torch.randn(1, 4, 3, 5).contiguous(memory_format=layout)
    result.backward(delta)
    assert arrived[0].data_ptr() == delta.data_ptr()


def test_what_hooks_on_saved_tensors_keep_is_not_asked_for() -> None:
    """Activation checkpointing would repeat the forward pass for it; the gradient is right all the same."""

    def forbidden(held: Any) -> Tensor:
        raise AssertionError("unpacked before the backward pass")

    norm, x = nn.BatchNorm2d(4).double().eval(), torch.randn(1, 4, 3, 5).double().requires_grad_()
    delta = from_tokens_first(torch.randn(1, 4, 3, 5).double())
    unpack = [forbidden]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: unpack[0](t)):
        result = norm(x)
    read_right([result])
    unpack[0] = lambda t: t
    result.backward(delta)
    torch.testing.assert_close(x.grad, delta / (1 + norm.eps) ** 0.5)
