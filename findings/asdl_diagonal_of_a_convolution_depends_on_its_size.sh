#!/usr/bin/env bash
# asdfghjkl 0.1a4 (the ASDL behind AsdlEF of laplace-torch) with torch 2.13.0: the diagonal Fisher of a convolution's weight is
# exact or not by which formula takes less memory: on small outputs it squares each position and sums the squares, and the cross
# terms of the positions are lost. So the same layer in the same network is right for larger images alone. Nothing says so.
# Seen: entries of 0.4 to 19 times the right ones for 8 channels on images of 4x4; exact for 10x10.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip() { "$folder/venv/bin/pip" install --quiet --disable-pip-version-check "$@"; }
pip torch==2.13.0 numpy==2.4.6
pip --no-deps asdfghjkl==0.1a4
"$folder/venv/bin/python" -W ignore - <<'PY'
import torch
from asdl import FisherConfig, get_fisher_maker
from asdl.fisher import FISHER_EMP, LOSS_CROSS_ENTROPY
from asdl.matrices import SHAPE_DIAG
from torch import nn


def ratios(size):
    torch.manual_seed(0)
    layer = nn.Conv2d(8, 8, 3)
    model = nn.Sequential(layer, nn.ReLU(), nn.Flatten(), nn.Linear(8 * (size - 2) ** 2, 3)).double()
    images, target = torch.randn(5, 8, size, size, dtype=torch.float64), torch.randint(3, (5,))
    right = 0
    for i in range(5):
        loss = nn.functional.cross_entropy(model(images[[i]]), target[[i]])
        right = right + torch.autograd.grad(loss, layer.weight)[0] ** 2
    maker = get_fisher_maker(model, FisherConfig(FISHER_EMP, [SHAPE_DIAG], loss_type=LOSS_CROSS_ENTROPY, data_size=1))
    logits = maker.setup_model_call(model, images)
    maker.setup_loss_call(nn.CrossEntropyLoss(reduction="sum"), logits, target)
    maker.forward_and_backward()
    return layer.fisher.diag.weight / right


small, large = ratios(4), ratios(10)
print("found over right: 4x4", small.min().item(), "to", small.max().item())
print("10x10", large.min().item(), "to", large.max().item())
assert (large - 1).abs().max() < 1e-10
assert small.min() < 0.5 and small.max() > 2, "the formula is exact for small images now"
PY
