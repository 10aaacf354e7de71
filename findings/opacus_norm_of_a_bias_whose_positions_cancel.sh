#!/usr/bin/env bash
# Opacus 1.6.0 with torch 2.13.0: the norm sampler of Linear on sequences takes the norm of a bias' gradient Σ_l δ_l as the root of
# Σ_ll' δ_l·δ_l'. Where the δ_l sum to nearly nothing, as behind anything that subtracts a mean over positions, float32 leaves the
# rounding errors of the terms: thousands of times the norm, or 0. Clipping by such norms clips by noise.
# Seen: norms of 0 to 4e-3, where the gradients' own are 1e-6; from the sums in float32 they are right to seven digits of the terms.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 opacus==1.6.0
"$folder/venv/bin/python" -W ignore - <<'PY'
import torch
from opacus.grad_sample.linear import compute_linear_norm_sample
from torch import nn

torch.manual_seed(0)
layer = nn.Linear(40, 50)
inputs, delta = torch.randn(64, 6, 40), torch.randn(64, 6, 50)
delta -= delta.mean(1, keepdim=True)
found = compute_linear_norm_sample(layer, [inputs], delta)[layer.bias]
right = delta.double().sum(1).norm(dim=1)
print("found", found[:4].tolist(), "right", right[:4].tolist())
assert (found.double() - right).abs().max() > 100 * right.max(), "Opacus takes norms of biases in another way now"
PY
