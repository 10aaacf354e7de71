#!/usr/bin/env bash
# curvlinops 3.0.1 with torch 2.13.0: where CrossEntropyLoss divides by the sum W of the class weights of its N samples, or by the
# number W of targets that are not ignored, EFLinearOperator is N / W² times the sum of gᵀg: neither 1 / W of it, as in the loss
# and in the operators of GGN and Hessian, nor the 1 / N of its documentation. So it and the GGN, which one compares, differ in scale.
# Seen: 6/16 of the matrix with 1 / W for weights 1, 2, 5 (W = 16, N = 6); 6/5 of it with one of six targets ignored.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 curvlinops-for-pytorch==3.0.1
"$folder/venv/bin/python" -W ignore - <<'PY'
import torch
from curvlinops import EFLinearOperator, GGNLinearOperator
from torch import nn

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
model, x = nn.Linear(3, 3), torch.randn(6, 3)
parameters = list(model.parameters())


def found(operator, target, **settings):
    return operator(model, nn.CrossEntropyLoss(**settings), parameters, [(x, target)]) @ torch.eye(12)


def right(kind, target, divisor, **settings):
    """The sum over samples of gᵀg or JᵀHJ of the sample's own loss, over the divisor of the mean."""
    loss_fn, total = nn.CrossEntropyLoss(reduction="sum", **settings), torch.zeros(12, 12)
    for i in range(len(x)):
        J = torch.cat([torch.kron(torch.eye(3), x[i]), torch.eye(3)], 1)  # of the outputs with respect to weight and bias
        at = model(x[i]).detach().requires_grad_()
        loss = loss_fn(at[None], target[i : i + 1])
        g = torch.autograd.grad(loss, at)[0] @ J
        H = torch.autograd.functional.hessian(lambda out: loss_fn(out[None], target[i : i + 1]), at.detach())
        total += torch.outer(g, g) if kind == "EF" else J.T @ H @ J
    return total / divisor


cases = {
    "equal": (torch.tensor([0, 1, 2, 0, 2, 1]), 6, {}),
    "weights": (torch.tensor([0, 1, 2, 0, 2, 1]), 16, {"weight": torch.tensor([1.0, 2.0, 5.0])}),
    "ignored": (torch.tensor([0, 1, 2, 0, -100, 1]), 5, {}),
}
ratios = {}
for name, (target, divisor, settings) in cases.items():
    torch.testing.assert_close(found(GGNLinearOperator, target, **settings), right("GGN", target, divisor, **settings))
    fisher, truth = found(EFLinearOperator, target, **settings), right("EF", target, divisor, **settings)
    ratios[name] = ((fisher * truth).sum() / (truth * truth).sum()).item()
    torch.testing.assert_close(fisher, ratios[name] * truth)
print("the empirical Fisher over the right one:", ratios)
assert abs(ratios["equal"] - 1) < 1e-12
assert abs(ratios["weights"] - 6 / 16) < 1e-12 and abs(ratios["ignored"] - 6 / 5) < 1e-12, "the divisor is right now"
PY
