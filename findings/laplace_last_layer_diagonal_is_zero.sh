#!/usr/bin/env bash
# laplace-torch 0.3 with torch 2.13.0: the diagonal empirical Fisher of the last layer by CurvlinopsEF is zero, so that the posterior
# is the prior, whatever the data. The full one of the same layer, the diagonal of all layers and BackPackEF are right.
# Seen: 15 zeros, where the squared gradients sum to 0.1 to 1.36; the posterior variance is 1 / prior precision.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip() { "$folder/venv/bin/pip" install --quiet --disable-pip-version-check "$@"; }
pip torch==2.13.0 torchmetrics==1.9.0 opt-einsum==3.4.0 tqdm==4.70.1 einops==0.8.2 unfoldNd==0.2.3
pip einconv==0.1.0 linear_operator==0.6.1 scipy==1.17.1 numpy==2.4.6
pip --no-deps laplace-torch==0.3 curvlinops-for-pytorch==3.0.1 backpack-for-pytorch==1.7.1 asdfghjkl==0.1a4
"$folder/venv/bin/python" -W ignore - <<'PY'
import torch
from laplace import Laplace
from laplace.curvature import BackPackEF, CurvlinopsEF
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
x, target = torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 2, 1])
right = torch.zeros(15)
for i in range(6):
    gradients = torch.autograd.grad(nn.functional.cross_entropy(model(x[[i]]), target[[i]]), list(model[2].parameters()))
    right += torch.cat([g.flatten() for g in gradients]) ** 2


def fitted(backend, structure):
    laplace = Laplace(model, "classification", subset_of_weights="last_layer", hessian_structure=structure, backend=backend)
    laplace.fit(DataLoader(TensorDataset(x, target), batch_size=3))
    return laplace


torch.testing.assert_close(fitted(BackPackEF, "diag").H, right)
torch.testing.assert_close(fitted(CurvlinopsEF, "full").H.diagonal(), right)
laplace = fitted(CurvlinopsEF, "diag")
print("found", laplace.H.tolist(), "right", right.tolist())
assert laplace.H.eq(0).all() and laplace.posterior_variance.eq(1).all(), "this diagonal is not zero now"
PY
