"""Times the diagonal of the empirical Fisher information over 10,000 images beside a plain epoch and its peers.

python benchmarks/fisher.py [--batch-size 128] [--images 10000] [--repeats 5]

LeNet-5 on random images in the shape of CIFAR-10's, one thread, CPU time, the shortest of alternating repetitions. Then
the most memory that the tensors of each occupy over 1,024 images at any moment, beside the network and the data, for
LeNet-5 and for an MLP of 10 million weights. What is not installed (BackPACK, laplace-torch) is left out.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import persample
from persample.checks.memory import peak_memory


def lenet() -> nn.Module:
    """Return the network of the paper's Table 1 for CIFAR-10: 62,006 weights."""
    convolutions = (nn.Conv2d(3, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2))
    linear = (nn.Flatten(), nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10))
    return nn.Sequential(*convolutions, *linear)


def mlp() -> nn.Module:
    """Return an MLP for the same images: 9,982,228 weights."""
    wide = (nn.Flatten(), nn.Linear(3072, 2048), nn.ReLU(), nn.Linear(2048, 1536), nn.ReLU())
    return nn.Sequential(*wide, nn.Linear(1536, 350), nn.ReLU(), nn.Linear(350, 10))


def images(number: int) -> TensorDataset:
    """Return random images with classes."""
    return TensorDataset(torch.randn(number, 3, 32, 32), torch.randint(10, (number,)))


def contestants(model: nn.Module, data: TensorDataset, batch_size: int) -> dict[str, Callable[[], object]]:
    """Return what is timed, by name."""
    batches = list(zip(*(tensor.split(batch_size) for tensor in data.tensors), strict=True))

    def plain() -> None:
        for inputs, targets in batches:
            model.zero_grad()
            F.cross_entropy(model(inputs), targets).backward()

    timed: dict[str, Callable[[], object]] = {
        "plain epoch": plain,
        "persample.fisher": lambda: persample.fisher(model, batches, loss_fn=persample.losses.cross_entropy),
    }
    if find_spec("backpack"):
        from backpack import backpack, extend
        from backpack.extensions import SumGradSquared

        extended, loss_fn = extend(copy.deepcopy(model)), extend(nn.CrossEntropyLoss(reduction="sum"))

        def by_backpack() -> None:
            total = [torch.zeros_like(p) for p in extended.parameters()]
            for inputs, targets in batches:
                extended.zero_grad()
                with backpack(SumGradSquared()):
                    loss_fn(extended(inputs), targets).backward()
                for so_far, p in zip(total, extended.parameters(), strict=True):
                    so_far += p.sum_grad_squared

        timed["BackPACK SumGradSquared"] = by_backpack
    if find_spec("laplace"):
        from laplace import Laplace
        from laplace.curvature import BackPackEF, CurvlinopsEF

        def by_laplace(backend: type) -> None:
            found = Laplace(
                copy.deepcopy(model),
                "classification",
                subset_of_weights="all",
                hessian_structure="diag",
                backend=backend,
            )
            found.fit(DataLoader(data, batch_size))

        timed["laplace-torch CurvlinopsEF"] = lambda: by_laplace(CurvlinopsEF)
        timed["laplace-torch BackPackEF"] = lambda: by_laplace(BackPackEF)
    return timed


def main() -> None:
    """Print the times."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    timed = contestants(lenet(), images(options.images), options.batch_size)
    times: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(options.repeats):
        for name, run in timed.items():
            began = time.process_time()
            run()
            times[name].append(time.process_time() - began)
    plain = min(times["plain epoch"])
    for name, found in times.items():
        print(f"{name:28} {min(found):7.3f} s  {min(found) / plain:5.2f} times a plain epoch")
    data = images(1024)
    for title, model in (("LeNet-5", lenet()), ("MLP", mlp())):
        weights = sum(p.nbytes for p in model.parameters())
        print(f"{title}, {weights / 2**20:.1f} MiB of weights")
        for name, run in contestants(model, data, options.batch_size).items():
            model.zero_grad()
            peak = peak_memory(run, torch.device("cpu"))
            print(f"{name:28} {peak / 2**20:7.1f} MiB  {peak / weights:6.1f} times the weights")


if __name__ == "__main__":
    main()
