#!/usr/bin/env bash
# transformers 5.24.0, accelerate 1.15.0: data_seed, if not given, is said to be that of `seed`. But the order of the training rows
# comes from torch.initial_seed() when train() makes its loader, so that a torch.manual_seed after the Trainer was made, as one
# writes to repeat an initialisation, changes the order. A resumed run then skips as many rows of another order, without a word.
# Seen: 24 rows, 3 of 6 batches before and 3 after: one epoch has seen 17 of the rows, 7 of them twice; 24 with data_seed=7.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.24.0 accelerate==1.15.0 numpy==2.3.5
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PY'
import torch
from transformers import Trainer, TrainingArguments


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.seen = []

    def forward(self, row):
        self.seen += row.tolist()
        return {"loss": (self.weight * row).mean()}


def rows(folder, resume=None, reseed=False, **seeds):
    settings = TrainingArguments(
        folder,
        seed=7,
        max_steps=6,
        save_steps=3,
        per_device_train_batch_size=4,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **seeds,
    )
    trainer = Trainer(model=Model(), args=settings, train_dataset=[{"row": i} for i in range(24)])
    if reseed:
        torch.manual_seed(1)
    trainer.train(resume_from_checkpoint=resume)
    return trainer.model.seen


def seen_in_an_epoch(folder, reseed, **seeds):
    first = rows(folder, **seeds)[:12]
    second = rows(folder, f"{folder}/checkpoint-3", reseed, **seeds)
    assert len(second) == 12
    return len({*first, *second})


assert seen_in_an_epoch("plain", reseed=False) == 24
assert seen_in_an_epoch("given", reseed=True, data_seed=7) == 24
found = seen_in_an_epoch("reseeded", reseed=True)
print("rows seen after a resumed epoch:", found, "of 24")
assert found < 24, "the order follows the seed of the settings now"
PY
