#!/usr/bin/env bash
# torch 2.13.0 (CPU): BatchNorm2d in eval mode, applied to a batch of ONE image whose result is read as tokens,
# flatten(2).transpose(1, 2), has a wrong gradient for its input and its scale. The same image twice in a batch is right.
# Seen: differences of 27.5 (input) and 21.6 (scale) in float64, where rounding would be 1e-14.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
"$folder/venv/bin/python" -W ignore - <<'PY'
import torch
from torch import nn

torch.manual_seed(0)
norm = nn.BatchNorm2d(3).double().eval()
norm.running_var.uniform_(0.5, 2.0)
weights = torch.arange(48.0, dtype=torch.float64).reshape(16, 3)


def gradients(images):
    norm.zero_grad()
    images = images.clone().requires_grad_()
    (norm(images).flatten(2).transpose(1, 2) * weights).sum().backward()
    return images.grad[0], norm.weight.grad / len(images)


image = torch.randn(1, 3, 4, 4, dtype=torch.float64)
for name, alone, beside in zip(("input", "scale"), gradients(image), gradients(torch.cat([image, image]))):
    difference = (alone - beside).abs().max().item()
    print(name, "differs by", difference)
    assert difference > 1, "PyTorch computes this gradient correctly now"
PY
