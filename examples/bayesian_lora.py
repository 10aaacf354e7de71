"""
Bayesian LoRA
=============

A language model stays frozen, and only the small matrices of its LoRA adapter are trained: with a posterior over them,
it can say where it is unsure. Of a script for Adam two lines change, the optimizer and the class of the Trainer::

    python examples/bayesian_lora.py

Needs peft: ``pip install "persample[peft,transformers]"``. Nothing is downloaded: the model is tiny, begins at random
weights and is pre-trained here to continue sequences that count up. The adapter then learns to count down, from few
sequences that hold the tokens 0 to 7 only.

.. image:: /images/bayesian-lora.png
   :alt: Entropy of the predictions, low on the tokens of the training data and high on others
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import persample
from persample.integrations.transformers import VariationalTrainer

TOKENS, LENGTH = 16, 8


def counting(size: int, *, step: int, below: int = TOKENS, seed: int = 0) -> list[dict[str, Tensor]]:
    """Return sequences that count up or down, modulo `below`, from a random token."""
    starts = torch.randint(below, (size, 1), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": row} for row in (starts + step * torch.arange(LENGTH)) % below]


def arguments(folder: str, **settings: Any) -> TrainingArguments:
    """Return settings of a Trainer that says little."""
    return TrainingArguments(folder, save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True, **settings)


def pretrained(folder: str, epochs: int) -> nn.Module:
    """Return a tiny language model that counts up."""
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=TOKENS,
            n_positions=LENGTH,
            n_embd=32,
            n_layer=2,
            n_head=2,
            bos_token_id=0,
            eos_token_id=0,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    )
    settings = arguments(folder, num_train_epochs=epochs, learning_rate=5e-3, per_device_train_batch_size=32)
    Trainer(model, settings, train_dataset=counting(512, step=1)).train()
    return model


def draw_entropies(entropies: Tensor, seen: int, path: Path) -> None:
    """Draw the mean entropy of the prediction after each token."""
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    colours = ["#0072B2" if token < seen else "#D55E00" for token in range(TOKENS)]
    axes.bar(range(TOKENS), entropies.tolist(), color=colours)
    axes.set(
        xlabel="token (blue: in the adapter's training data)",
        ylabel="entropy of the next (nats)",
        title="The adapter is unsure after tokens that it was not trained on",
    )
    axes.set_xticks(range(TOKENS))
    figure.savefig(path, dpi=120)


def main(options: list[str] | None = None) -> tuple[float, float]:
    """Train, print what was reached; return the mean entropy after tokens of the training data, and after others."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--out", type=Path, default=Path("bayesian-lora.png"))
    chosen = parser.parse_args(options)

    torch.manual_seed(0)
    seen = 8
    data = counting(128, step=-1, below=seen, seed=1)
    with tempfile.TemporaryDirectory() as folder:
        model = get_peft_model(pretrained(folder, epochs=10), LoraConfig(r=4, target_modules=["c_attn", "c_fc"]))
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        print(f"{trained} of {sum(p.numel() for p in model.parameters())} weights are trained")
        optimizer = persample.VOGN(model, data_size=len(data), lr=0.05, prior_precision=1.0)
        trainer = VariationalTrainer(
            model,
            arguments(folder, num_train_epochs=chosen.epochs, per_device_train_batch_size=32),
            train_dataset=data,
            eval_dataset=counting(64, step=-1, below=seen, seed=2),
            optimizers=(optimizer, None),
        )
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        after = trainer.evaluate()["eval_loss"]
        # A sequence of one token, and the prediction of the next one.
        predicted = optimizer.predict({"input_ids": torch.arange(TOKENS)[:, None]}, pick=lambda o: o.logits[:, -1])
    known, unknown = predicted.entropy[:seen].mean().item(), predicted.entropy[seen:].mean().item()
    print(f"log loss of new sequences: {before:.3f} before, {after:.3f} nats after")
    print(f"entropy after tokens that were seen: {known:.2f} nats, after others: {unknown:.2f} nats")
    draw_entropies(predicted.entropy, seen, chosen.out)
    print(f"picture: {chosen.out}")
    return known, unknown


if __name__ == "__main__":
    main()

# sphinx_gallery_thumbnail_path = "images/bayesian-lora.png"
