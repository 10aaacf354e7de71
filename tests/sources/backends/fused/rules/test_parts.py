"""Parameters beside samples, such as a class token: what is read of them is theirs, whose samples' rows it may be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import persample
from persample.errors import UnsupportedModelError
from persample.testing.devices import generator_of


class Frames(nn.Module):
    """Puts tokens before patches of B·T frames, and those that `read` takes from there before patches of B videos.

    Args:
        read: returns the tokens, `(B, K, 4)`, from those of frames, `(B·T, K + 2, 4)`, B and K.
        tokens: K.
    """

    def __init__(self, read: Callable[[Frames, Tensor, int, int], Tensor], tokens: int = 1) -> None:
        super().__init__()
        self.tokens, self.places = (nn.Parameter(torch.randn(1, n, 4)) for n in (tokens, 2 + tokens))
        self.embed, self.out, self.read = nn.Linear(4, 4), nn.Linear(4, 3), read
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        videos, count = len(x), self.tokens.shape[1]
        patches = self.embed(x.flatten(0, 1))
        h = torch.cat([self.tokens.expand(len(patches), -1, -1), patches], 1)
        read = self.read(self, h, videos, count)
        output: Tensor = self.out(torch.cat([read, h[:, count:].reshape(videos, -1, 4)], 1))
        return output


def in_three_steps(model: Frames, h: Tensor, videos: int, count: int) -> Tensor:
    moved = (h.transpose(1, 2).unsqueeze(0)[:, :videos] * 2).squeeze(0)
    return moved[..., :count].mT


SERVED: dict[str, Callable[[Frames, Tensor, int, int], Tensor]] = {
    "the first rows": lambda model, h, b, k: h[:b, :k],
    "any rows": lambda model, h, b, k: h[torch.arange(len(h) - 1, len(h) - 1 - b, -1), :k],
    "narrowed": lambda model, h, b, k: h.narrow(0, 0, b).narrow(1, 0, k),
    "one token": lambda model, h, b, k: h[:b, 0, :].unsqueeze(1),
    "with positions": lambda model, h, b, k: (model.places + h)[:b, :k],
    "positions of some rows": lambda model, h, b, k: (h[:b] + model.places)[:, :k],
    "entry by entry": lambda model, h, b, k: (2 * torch.tanh(h * 0.5).exp())[:b, :k],
    "dropout in eval mode": lambda model, h, b, k: F.dropout(h, 0.5, training=False)[:b, :k],
    "in three steps": in_three_steps,
    "twice": lambda model, h, b, k: h[:b, :k].mean(1, keepdim=True) * h[:b, :k],
}


def loss_fn(outputs: Tensor, _: Any) -> Tensor:
    return outputs.flatten(1).sin().sum(1)


def videos(count: int, frames: int) -> Tensor:
    return torch.randn(count, frames, 2, 4, generator=generator_of(1)).double()


@pytest.mark.parametrize("count", [(3, 2), (2, 3), (4, 1)])
@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize("name", SERVED)
def test_rows_of_tokens(name: str, tokens: int, count: tuple[int, int], per_sample_truth: Any) -> None:
    torch.manual_seed(0)
    model, x = Frames(SERVED[name], tokens), videos(*count)
    truth = per_sample_truth(model, loss_fn, x, None).gradients
    source = persample.make_source("fused", model, loss_fn, check="never")
    torch.testing.assert_close(source.per_sample(x, None), truth)
    squares = {name: g.square().mean(0) for name, g in truth.items()}
    torch.testing.assert_close(source.moments(x, None).second_moment, squares)


def test_stacked_tokens(per_sample_truth: Any) -> None:
    class Stacked(Frames):
        def forward(self, x: Tensor) -> Tensor:
            first, second = self.embed(x.flatten(0, 1)).unbind(1)
            h = torch.stack([first, self.tokens[:, 0].expand(len(first), -1), second], 1)
            output: Tensor = self.out(torch.cat([h[: len(x), 1:2], h[:, ::2].reshape(len(x), -1, 4)], 1))
            return output

    model, x = Stacked(lambda *args: args[1]), videos(3, 2)
    truth = per_sample_truth(model, loss_fn, x, None).gradients
    source = persample.make_source("fused", model, loss_fn, check="never")
    torch.testing.assert_close(source.per_sample(x, None), truth)


def changed_behind(model: Frames, h: Tensor, videos: int, count: int) -> Tensor:
    read = h[:videos, :count]
    h.mul_(2)
    return read


def changed_itself(model: Frames, h: Tensor, videos: int, count: int) -> Tensor:
    return h[:videos, :count].mul_(2)


def changed_before(model: Frames, h: Tensor, videos: int, count: int) -> Tensor:
    h[:, :count].mul_(model.embed.bias.detach()[:1])
    h[0, 0] = h[-1, -1]
    return h[:videos, :count]


REFUSED: dict[str, tuple[Callable[[Frames, Tensor, int, int], Tensor], str]] = {
    "a patch, too": (lambda model, h, b, k: h[:b, : k + 1], "rows of other samples"),
    "another dropout for each row": (lambda model, h, b, k: F.dropout(h, 0.5)[:b, :k], "rows of other samples"),
    "changed in place behind": (changed_behind, "changed in place after rows"),
    "changed in place itself": (changed_itself, "changes in place a tensor"),
    "changed in place before": (changed_before, "mixes the samples|rows of other samples"),
}


@pytest.mark.parametrize("check", ["first", "never"])
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_token_any_more_is_refused(name: str, check: str) -> None:
    read, reason = REFUSED[name]
    source = persample.make_source("fused", Frames(read), loss_fn, check=check)
    with pytest.raises(UnsupportedModelError, match=reason):
        source.moments(videos(3, 2), None)


def test_rows_of_tokens_while_recording(per_sample_truth: Any) -> None:
    torch.manual_seed(0)
    for name, reason in ("with positions", None), ("changed in place behind", "changed in place after rows"):
        model, x = Frames(SERVED.get(name) or REFUSED[name][0]), videos(3, 2)
        source = persample.make_source("fused", model, loss_fn, check="never")
        if reason is not None:
            with pytest.raises(UnsupportedModelError, match=reason), source.recording():
                loss_fn(model(x), None).mean().backward()
            continue
        with source.recording() as recorded:
            loss_fn(model(x), None).mean().backward()
        truth = per_sample_truth(model, loss_fn, x, None).gradients
        squares = {name: g.square().mean(0) for name, g in truth.items()}
        torch.testing.assert_close(recorded.moments().second_moment, squares)


# Parameters beside whole samples, as the inducing points of sparse Gaussian processes are.


class Inducing(nn.Module):
    """Puts four points before the features of the samples; `use` makes the losses of both, `(4 + B, 2)`."""

    def __init__(self, use: Callable[[Inducing, Tensor], Tensor]) -> None:
        super().__init__()
        self.points, self.weights = nn.Parameter(torch.randn(4, 2)), nn.Parameter(torch.randn(4))
        self.features, self.more, self.use = nn.Linear(3, 2), nn.Linear(2, 2), use
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self, torch.cat([self.points, self.features(x)]))


def kernel(left: Tensor, right: Tensor) -> Tensor:
    return (left.unsqueeze(1) - right).square().sum(-1).neg().exp()


INDUCING: dict[str, Callable[[Inducing, Tensor], Tensor]] = {
    "slices": lambda model, h: kernel(h[4:], h[:4]) @ model.weights,
    "samples in dim 1": lambda model, h: model.weights @ kernel(h[:4], h[4:]),
    "split": lambda model, h: kernel(h.split([4, len(h) - 4])[1], h.split([4, len(h) - 4])[0]) @ model.weights,
    "picked": lambda model, h: kernel(h[torch.arange(4, len(h))], h[[2, 0]]) @ model.weights[:2],
    "entry by entry": lambda model, h: kernel((h * 2).tanh()[4:], (h * model.more.bias)[:4]) @ model.weights,
    "a layer behind": lambda model, h: kernel(model.more(h[4:]), h[:4]) @ model.weights,
    "compared": lambda model, h: kernel(h[4:], h[:4]) @ model.weights * (1 + torch.equal(h[4:], h[:4])),
    "samples alone": lambda model, h: h.unbind(1)[0][4:].sin(),
    "a kernel of all": lambda model, h: kernel(h, h)[4:, :4] @ model.weights,
    "a layer of all": lambda model, h: kernel(model.more(h)[4:], model.more(h)[:4]) @ model.weights,
    "statistics of all": lambda model, h: kernel(h[4:] - h.mean(0), h[:4]) @ model.weights,
    "samples changed in place": lambda model, h: kernel(h[4:].mul_(2), h[:4]) @ model.weights,
}
ONE_BY_ONE = ("a kernel of all", "a layer of all", "statistics of all", "samples changed in place")


@pytest.mark.parametrize("size", [3, 4, 7])
@pytest.mark.parametrize("name", INDUCING)
def test_parameters_beside_whole_samples(name: str, size: int, per_sample_truth: Any) -> None:
    torch.manual_seed(0)
    model, x = Inducing(INDUCING[name]), torch.randn(size, 3).double()
    source = persample.make_source("fused", model, lambda outputs, _: outputs, check="never")
    if name in ONE_BY_ONE:
        with pytest.raises(UnsupportedModelError):
            source.moments(x, None)
        return
    truth = per_sample_truth(model, lambda outputs, _: outputs, x, None).gradients
    torch.testing.assert_close(source.per_sample(x, None), truth)
