#!/usr/bin/env bash
# transformers 5.24.0, accelerate 1.15.0: Trainer.evaluate() of a GPT-2 divides the summed loss of next tokens by the number of all
# labels, of which the first of each sequence is never predicted. The model's own .loss divides by those that count.
# Sequences of 7 tokens without padding. Seen: eval_loss is 6/7 of the mean cross-entropy, which is the model's own loss.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.24.0 accelerate==1.15.0 numpy==2.3.5
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PY'
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

torch.manual_seed(0)
config = GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
model = GPT2LMHeadModel(config).eval()
tokens = torch.randint(11, (6, 7))
with torch.no_grad():
    output = model(tokens, labels=tokens)
mean = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).item()
assert abs(output.loss.item() - mean) < 1e-5
settings = TrainingArguments("out", per_device_eval_batch_size=6, use_cpu=True, report_to=[], disable_tqdm=True)
trainer = Trainer(model=model, args=settings, eval_dataset=[{"input_ids": row, "labels": row} for row in tokens])
told = trainer.evaluate()["eval_loss"]
print(f"mean cross-entropy {mean:.4f}, eval_loss {told:.4f}, ratio {told / mean:.4f}")
assert abs(told / mean - 6 / 7) < 1e-4, "eval_loss is the mean now"
PY
