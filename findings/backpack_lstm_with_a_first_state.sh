#!/usr/bin/env bash
# BackPACK 1.7.1 with torch 2.13.0: BatchGrad of an LSTM that is given a first state is wrong, without a word: its rule computes the
# rows as if the state were zero. Without a first state the same rows are exact.
# Seen: the sum of the rows is off by 2.27 for weight_hh_l0, and by 2e-16 without a first state.
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
    def __init__(self, first_state):
        super().__init__()
        self.lstm = nn.LSTM(3, 4, batch_first=True)
        self.first_state = first_state

    def forward(self, x):
        if not self.first_state:
            return self.lstm(x)[0]
        h = torch.randn(1, len(x), 4, dtype=x.dtype, generator=torch.Generator().manual_seed(1))
        return self.lstm(x, (h, h))[0]


def off(first_state):
    torch.manual_seed(0)
    model = extend(Model(first_state).double())
    x = torch.randn(5, 6, 3, dtype=torch.float64)
    with backpack(BatchGrad()):
        model(x).square().sum().backward()
    return {name: (p.grad_batch.sum(0) - p.grad).abs().max().item() for name, p in model.lstm.named_parameters()}


print("without a first state, off by", off(False))
print("with one, off by", off(True))
assert max(off(False).values()) < 1e-12
assert off(True)["weight_hh_l0"] > 0.1, "BackPACK is right here now"
PY
