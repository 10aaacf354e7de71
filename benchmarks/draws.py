"""Times predictions that average 32 draws beside 32 forward passes, with different numbers of draws in one pass.

python benchmarks/draws.py [--repeats 5]

One thread, CPU time, the shortest of alternating repetitions, over that of 32 forward passes. Drawing the weights
and adding up the probabilities is in it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import persample
from persample.experiments.models import model_for

DRAWS = 32
AT_ONCE = (1, 4, 32, None)


def networks() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    """Return the networks with the shapes of their inputs, by name."""
    mlp = nn.Sequential(nn.Linear(784, 400), nn.ReLU(), nn.Linear(400, 400), nn.ReLU(), nn.Linear(400, 10))
    small = nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 3))
    return {
        "MLP 10-32-32-3": (small, (10,)),
        "ConvNet": (model_for("mnist"), (1, 28, 28)),
        "LeNet-5": (model_for("cifar10"), (3, 32, 32)),
        "MLP 784-400-400-10": (mlp, (784,)),
    }


def contestants(model: nn.Module, inputs: Tensor) -> dict[str, Callable[[], object]]:
    """Return what is timed, by name; the forward passes first."""
    mean = {name: p.detach().clone() for name, p in model.named_parameters()}
    posterior = persample.Posterior(mean, {name: torch.full_like(t, 1e4) for name, t in mean.items()}, model)

    @torch.no_grad()
    def plain() -> None:
        for _ in range(DRAWS):
            model(inputs)

    def averaged(at_once: int | None) -> Callable[[], object]:
        return lambda: posterior.predict(inputs, samples=DRAWS, draws_at_once=at_once)

    return {"forward passes": plain, **{str(number): averaged(number) for number in AT_ONCE}}


def main() -> None:
    """Print a table in Markdown."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    torch.manual_seed(0)
    columns = [f"{number} at once" if number else "default" for number in AT_ONCE]
    print(f"| network | batch | {' | '.join(columns)} |\n|---|---|{'---|' * len(columns)}")
    for name, (model, shape) in networks().items():
        for batch_size in (1, 32, 128, 512):
            timed = contestants(model, torch.randn(batch_size, *shape))
            times: dict[str, list[float]] = {key: [] for key in timed}
            for _ in range(repeats):
                for key, run in timed.items():
                    began = time.process_time()
                    run()
                    times[key].append(time.process_time() - began)
            plain, *others = (min(found) for found in times.values())
            print(f"| {name} | {batch_size} | {' | '.join(f'{t / plain:.2f}' for t in others)} |", flush=True)


if __name__ == "__main__":
    main()
