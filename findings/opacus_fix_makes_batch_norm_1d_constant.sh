#!/usr/bin/env bash
# Opacus 1.6.0 with torch 2.13.0: ModuleValidator.fix replaces BatchNorm1d(32) on vectors by GroupNorm(32, 32), whose groups hold one
# number each: the network loses its input there. It also drops the layer's scale, shift, eps and dtype.
# Seen: outputs of 3e-14 for random inputs; scale 3 became 1, eps 0.01 became 1e-05, float64 became float32.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 opacus==1.6.0
"$folder/venv/bin/python" -W ignore - <<'PY'
import torch
from opacus.validators import ModuleValidator
from torch import nn

torch.manual_seed(0)
norm = nn.BatchNorm1d(32, eps=1e-2).double()
nn.init.constant_(norm.weight, 3.0)
fixed = ModuleValidator.fix(nn.Sequential(nn.Linear(8, 32).double(), norm))
print(fixed[1], fixed[1].weight.dtype, fixed[1].weight[0].item())
assert (fixed[1].num_groups, fixed[1].eps, fixed[1].weight.dtype) == (32, 1e-05, torch.float32), "fix changed"
assert fixed[1].weight.eq(1).all(), "fix keeps the scale now"
outputs = fixed[1].double()(fixed[0](torch.randn(4, 8, dtype=torch.float64)))
print("largest output", outputs.abs().max().item())
assert outputs.abs().max() < 1e-10, "the outputs depend on the inputs now"
PY
