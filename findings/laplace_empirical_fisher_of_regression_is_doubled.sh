#!/usr/bin/env bash
# laplace-torch 0.3 with torch 2.13.0: the empirical Fisher for regression is twice the sum of squared gradients of the
# log-likelihood, because the factor 1/2, which turns the summed squared error into it, goes on the square of its gradient, where
# it would be 1/4. The GGN of the same model is right. Diagonal and full, CurvlinopsEF and BackPackEF alike.
# Seen: a ratio of 2.0 to within 1e-12 in all four, and 1.0 for the GGN.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip() { "$folder/venv/bin/pip" install --quiet --disable-pip-version-check "$@"; }
pip torch==2.13.0 torchmetrics==1.9.0 opt-einsum==3.4.0 tqdm==4.70.1 einops==0.8.2 unfoldNd==0.2.3
pip einconv==0.1.0 linear_operator==0.6.1 scipy==1.17.1 numpy==2.4.6
pip --no-deps laplace-torch==0.3 curvlinops-for-pytorch==3.0.1 backpack-for-pytorch==1.7.1 asdfghjkl==0.1a4
"$folder/venv/bin/python" -W ignore - <<'PY'
import copy

import torch
from laplace import Laplace
from laplace.curvature import BackPackEF, CurvlinopsEF, CurvlinopsGGN
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
model, x, y = nn.Sequential(nn.Linear(3, 1)), torch.randn(6, 3), torch.randn(6, 1)
J = torch.cat([x, torch.ones(6, 1)], 1)  # of the outputs with respect to weight and bias
residual = (model(x) - y).detach()  # with noise 1, the gradients of -log p(y | x) are residual · J
fisher, ggn = (residual * J).square().sum(0), J.square().sum(0)


def ratio(backend, structure, right):
    laplace = Laplace(copy.deepcopy(model), "regression", subset_of_weights="all", hessian_structure=structure, backend=backend)
    laplace.fit(DataLoader(TensorDataset(x, y), batch_size=3))
    ratios = (laplace.H if structure == "diag" else laplace.H.diagonal()) / right
    assert (ratios - ratios[0]).abs().max() < 1e-12
    return ratios[0].item()


for structure in ("diag", "full"):
    found = {backend.__name__: ratio(backend, structure, fisher) for backend in (CurvlinopsEF, BackPackEF)}
    print(structure, "empirical Fisher over the right one:", found)
    assert abs(ratio(CurvlinopsGGN, structure, ggn) - 1) < 1e-12
    assert all(abs(value - 2) < 1e-12 for value in found.values()), "the factor is right now"
PY
