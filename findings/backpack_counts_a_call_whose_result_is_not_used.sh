#!/usr/bin/env bash
# BackPACK 1.7.1 with torch 2.13.0: BatchGrad is wrong, without a word, where a layer is called once more and the second result is
# not used: the rows are computed with the input of the unused call.
# Seen: the sum of the rows of the weight is off by 31, where the largest entry of the gradient is 3.9.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 einops==0.8.2 unfoldNd==0.2.3
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps backpack-for-pytorch==1.7.1
"$folder/venv/bin/python" -W ignore - <<'PY'
import torch
from backpack import backpack, extend
from backpack.extensions import BatchGrad
from torch import nn


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x):
        y = self.layer(x)
        self.layer(9 * x)  # for a log, say
        return y


torch.manual_seed(0)
model = extend(Model().double())
with backpack(BatchGrad()):
    model(torch.randn(5, 3, dtype=torch.float64)).square().sum().backward()
weight = model.layer.weight
off = (weight.grad_batch.sum(0) - weight.grad).abs().max().item()
print("off by", off, "largest entry", weight.grad.abs().max().item())
assert off > 1, "BackPACK is right here now"
PY
