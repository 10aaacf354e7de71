"""
Trainer of Hugging Face
=======================

Train a tiny transformer. Of a script for Adam two lines change, the optimizer and the class of the Trainer::

    python examples/hugging_face_trainer.py --epochs 5

Needs transformers and accelerate: ``pip install "persample[transformers]"``. Nothing is downloaded: the model begins at
random weights, and the task is made up. Which of two tokens comes more often in a sequence?

.. image:: /images/hugging-face.png
   :alt: Mean probability of the answer over the number of tokens 2, steep at one half
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch.utils.data import Dataset
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments

import persample
from persample.integrations.transformers import VariationalTrainer


class Majority(Dataset[dict[str, torch.Tensor]]):
    """Sequences of 15 tokens 1 and 2, and whether there are more of 2."""

    def __init__(self, size: int, seed: int) -> None:
        self.tokens = torch.randint(1, 3, (size, 15), generator=torch.Generator().manual_seed(seed))
        self.labels = ((self.tokens == 2).sum(1) > 7).long()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.labels[index]}


def draw_probabilities(tokens: torch.Tensor, probabilities: torch.Tensor, path: Path) -> None:
    """Draw the mean probability of the answer "more of 2", and its spread, for each number of tokens 2."""
    counts = (tokens == 2).sum(1)
    chances = [probabilities[counts == count, 1] for count in counts.unique()]
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    means, spreads = [c.mean().item() for c in chances], [c.std(correction=0).item() for c in chances]
    axes.errorbar(counts.unique().tolist(), means, spreads, fmt="o-", color="#0072B2", capsize=3)
    axes.axvline(7.5, color="#D55E00", linestyle=":", label="half of the tokens")
    axes.set(xlabel="tokens 2 among 15", ylabel="probability of “more of 2”", title="Unsure where the counts are close")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def main(arguments: list[str] | None = None) -> float:
    """Train, print what was reached on new sequences, and return the log loss in nats."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--out", type=Path, default=Path("hugging-face.png"))
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=3,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=16,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            num_labels=2,
        )
    )
    new = Majority(1000, seed=2)
    optimizer = persample.VOGN(model, data_size=options.samples, lr=0.05, prior_precision=1.0)
    with tempfile.TemporaryDirectory() as folder:
        trainer = VariationalTrainer(
            model,
            TrainingArguments(
                folder,
                num_train_epochs=options.epochs,
                per_device_train_batch_size=16,
                gradient_accumulation_steps=2,
                lr_scheduler_type="cosine",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
            ),
            train_dataset=Majority(options.samples, seed=1),
            optimizers=(optimizer, None),
        )
        trainer.train()
        predicted = trainer.predict(new)  # by the average over draws

    probabilities = torch.tensor(predicted.predictions).exp()
    log_loss = predicted.metrics["test_loss"]
    accuracy = (probabilities.argmax(1) == new.labels).float().mean().item()
    print(f"new sequences: log loss {log_loss:.3f} nats, accuracy {accuracy:.1%}")
    draw_probabilities(new.tokens, probabilities, options.out)
    print(f"picture: {options.out}")
    return log_loss


if __name__ == "__main__":
    main()

# sphinx_gallery_thumbnail_path = "images/hugging-face.png"
