#!/usr/bin/env bash
# Opacus 1.6.0 with torch 2.13.0: a layer that stands in a model both directly and inside a nested Sequential gets the hooks of
# GradSampleModule twice, and its grad_sample is wrong without a word. (A layer called twice by one forward is fine.)
# Seen: the sum over samples is off by 1.69, as much as the largest entry of the ordinary gradient.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 opacus==1.6.0
"$folder/venv/bin/python" -W ignore - <<'PY'
import torch
from opacus import GradSampleModule
from torch import nn

torch.manual_seed(0)
shared = nn.Linear(4, 4)
model = nn.Sequential(shared, nn.Tanh(), nn.Sequential(shared, nn.Tanh())).double()
GradSampleModule(model, loss_reduction="sum")(torch.randn(5, 4, dtype=torch.float64)).square().sum().backward()
off = (shared.weight.grad_sample.sum(0) - shared.weight.grad).abs().max().item()
print("off by", off, "largest entry", shared.weight.grad.abs().max().item())
assert off > 0.1, "Opacus is right for a layer at two paths now"
PY
