"""The methods of the contest: how each is trained, and the networks that its predictions average."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from persample import IVON, VOGN, Posterior, Vadam, laplace, losses
from persample.experiments.contest.course import Course
from persample.vogn import ClassPrediction, VariationalOptimizer

Step: TypeAlias = Callable[[Tensor, Tensor], Tensor]

_ROWS_AT_ONCE = 500


class Predictor(Protocol):
    """The result of a training: a distribution over networks."""

    def predict(
        self, inputs: Any, *, samples: int, generator: torch.Generator | None, rows_at_once: int | None
    ) -> ClassPrediction:
        """Predict by the average over draws of the networks, see `Posterior.predict`."""


@dataclass(kw_only=True)
class Training:
    """A training that begins.

    Attributes:
        optimizer: Whose learning rate follows the schedule.
        step: Trains on inputs and targets of one batch, and returns its mean loss.
        predictor: Returns what was learned.
        schedule: The factor on the learning rate, by the part of the training that is done, from 0 to 1.
        after_epoch: Is told how many epochs are done.
    """

    optimizer: torch.optim.Optimizer
    step: Step
    predictor: Callable[[], Predictor]
    schedule: Callable[[float], float] = lambda done: (1 + math.cos(math.pi * done)) / 2
    after_epoch: Callable[[int], None] = lambda _: None


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method of the contest: it is trained, made of a trained network, or of several runs of another method.

    Attributes:
        start: Begins a training with settings of its own; None if nothing is trained.
        convert: Makes a posterior of the network that `of` trained, with settings of its own.
        of: The method whose runs this one takes, if any.
        runs: How many of them it takes.
        draws: How many networks a prediction averages, of each run.
    """

    start: Callable[..., Training] | None = None
    convert: Callable[..., Predictor] | None = None
    of: str | None = None
    runs: int = 1
    draws: int = 32


# One network.


def _plain(model: nn.Module, optimizer: torch.optim.Optimizer, **more: Any) -> Training:
    """Train by the mean loss of the batch; one network predicts, unless `more` says something else."""

    def step(inputs: Tensor, targets: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs), targets)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return Training(optimizer=optimizer, step=step, **{"predictor": lambda: sure(model), **more})


def sure(model: nn.Module) -> Posterior:
    """Return the distribution that has all its mass at the weights of the model."""
    mean = {name: p.detach().clone() for name, p in model.named_parameters()}
    return Posterior(mean, {name: torch.full_like(value, math.inf) for name, value in mean.items()}, model)


def adam(course: Course, *, lr: float) -> Training:
    """Adam (Kingma and Ba, 2015)."""
    model = course.network()
    return _plain(model, torch.optim.Adam(model.parameters(), lr=lr, fused=course.fused))


def adamw(course: Course, *, lr: float, weight_decay: float) -> Training:
    """Adam with decoupled weight decay (Loshchilov and Hutter, 2019)."""
    model = course.network()
    return _plain(model, torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay, fused=course.fused))


# Dropout.


@dataclass(frozen=True)
class DropoutNetworks:
    """The networks that dropout makes of one: each draw leaves out other inputs of the linear layers."""

    model: nn.Module

    @torch.no_grad()
    def predict(
        self, inputs: Tensor, *, samples: int, generator: torch.Generator | None, rows_at_once: int | None
    ) -> ClassPrediction:
        """Predict by the average over draws; they come from PyTorch's global generator, `generator` is not used."""
        self.model.train()
        parts = [self._of_rows(rows, samples) for rows in inputs.split(rows_at_once or len(inputs))]
        probabilities = torch.cat([probabilities for probabilities, _ in parts])
        entropy = torch.special.entr(probabilities).sum(1)
        information = (entropy - torch.cat([entropies for _, entropies in parts])).clamp(min=0)
        return ClassPrediction(probabilities, entropy, information)

    def _of_rows(self, inputs: Tensor, samples: int) -> tuple[Tensor, Tensor]:
        """Mean probabilities, and mean of the entropies of the single draws."""
        draws = torch.stack([self.model(inputs).softmax(1) for _ in range(samples)])
        return draws.mean(0), torch.special.entr(draws).sum(2).mean(0)


def mc_dropout(course: Course, *, lr: float, rate: float) -> Training:
    """Adam with dropout before each linear layer, which stays on for predictions (Gal and Ghahramani, 2016)."""
    model = with_dropout(course.network(), rate).to(course.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=course.fused)
    return _plain(model, optimizer, predictor=lambda: DropoutNetworks(model))


def with_dropout(model: nn.Sequential, rate: float) -> nn.Sequential:
    """Return the model with dropout before each of its linear layers."""
    layers = [[nn.Dropout(rate), layer] if isinstance(layer, nn.Linear) else [layer] for layer in model]
    return nn.Sequential(*(layer for pair in layers for layer in pair))


# Gaussians around the path of an optimizer, or around its end.


def swag(course: Course, *, lr: float, swa_lr: float) -> Training:
    """SWAG with a diagonal (Maddox et al., 2019): mean and variance of the weights after each of the later epochs.

    The learning rate of Adam falls along half a cosine to `swa_lr` in the first half of the epochs, and stays there.
    """
    model = course.network()
    params = dict(model.named_parameters())
    average = AveragedModel(model)
    squares = {name: torch.zeros_like(p) for name, p in params.items()}

    @torch.no_grad()
    def collect(epochs: int) -> None:
        if epochs > course.epochs // 2:
            average.update_parameters(model)
            for name, p in params.items():
                squares[name] += p.square()

    def posterior() -> Posterior:
        mean = {name: p.detach() for name, p in average.module.named_parameters()}
        number = int(average.n_averaged)
        variance = {name: (squares[name] / number - value.square()).clamp(min=0) for name, value in mean.items()}
        return Posterior(mean, {name: value.reciprocal() for name, value in variance.items()}, model)

    def schedule(done: float) -> float:
        return (swa_lr + (lr - swa_lr) * (1 + math.cos(math.pi * min(1.0, 2 * done))) / 2) / lr

    optimizer = torch.optim.Adam(params.values(), lr=lr, fused=course.fused)
    return _plain(model, optimizer, schedule=schedule, after_epoch=collect, predictor=posterior)


def laplace_of_all(course: Course, network: Posterior, *, prior_precision: Any) -> Posterior:
    """Laplace with a diagonal (Daxberger et al., 2021): the Fisher information by targets drawn from the model."""
    return _laplace(course, network, prior_precision, lambda model: model.parameters())


def laplace_of_last(course: Course, network: Posterior, *, prior_precision: Any) -> Posterior:
    """Laplace with a diagonal over the last layer alone; the others stay as they are."""
    return _laplace(course, network, prior_precision, lambda model: model[-1].parameters())


def _laplace(course: Course, network: Posterior, prior_precision: Any, chosen: Callable[[Any], Any]) -> Posterior:
    model = course.network()
    model.load_state_dict(dict(network.mean))
    model.requires_grad_(False).eval()
    for p in chosen(model):
        p.requires_grad_(True)
    return laplace(
        model,
        zip(course.data.train_inputs.split(_ROWS_AT_ONCE), course.data.train_targets.split(_ROWS_AT_ONCE), strict=True),
        loss_fn=losses.cross_entropy,
        prior_precision=prior_precision,
        kind="mc",
        generator=course.generator("noise"),
    )


# Variational training.


def variational(rule: type[VariationalOptimizer], course: Course, **settings: Any) -> Training:
    """A posterior that is trained: by `VOGN`, `IVON` or `Vadam`."""
    optimizer = rule(
        course.network(),
        losses.cross_entropy,
        data_size=len(course.data.train_targets),
        generator=course.generator("noise"),
        **settings,
    )

    def step(inputs: Tensor, targets: Tensor) -> Tensor:
        loss = optimizer.observe(inputs, targets)
        optimizer.step()
        return loss

    return Training(optimizer=optimizer, step=step, predictor=lambda: optimizer.posterior)


def vogn(course: Course, **settings: Any) -> Training:
    """VOGN, by the backend `fused`; on a GPU its steps are replayed as CUDA graphs."""
    replay = course.device.type == "cuda" and not course.eager
    options = {"deterministic": True, "compile": "cuda-graph" if replay else False}
    return variational(VOGN, course, backend_options=options, **settings)


METHODS: Mapping[str, Method] = {
    "VOGN": Method(start=vogn),
    "IVON": Method(start=partial(variational, IVON)),
    "Vadam": Method(start=partial(variational, Vadam)),
    "SWAG": Method(start=swag),
    "MC dropout": Method(start=mc_dropout),
    "AdamW": Method(start=adamw, draws=1),
    "Adam": Method(start=adam, draws=1),
    "Laplace": Method(convert=laplace_of_all, of="Adam"),
    "Laplace, last layer": Method(convert=laplace_of_last, of="Adam"),
    "3 × Adam": Method(of="Adam", runs=3, draws=1),
    "3 × VOGN": Method(of="VOGN", runs=3),
}
