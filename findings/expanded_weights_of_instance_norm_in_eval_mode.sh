#!/usr/bin/env bash
# torch 2.13.0: expanded weights (call_for_per_sample_grads, which Opacus offers as grad_sample_mode="ew") give wrong per-sample
# gradients of InstanceNorm with running statistics in eval mode, without a word: the backward pass normalises by the statistics of
# the sample, where the forward pass took the running ones. The outputs are right, and so is training mode.
# Seen: 0.58 to 0.78 of the right gradient of the scale; the same layer in training mode is exact (1e-16).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PY'
import torch
from torch import nn
from torch.nn.utils._per_sample_grad import call_for_per_sample_grads

torch.manual_seed(0)
norm = nn.InstanceNorm2d(4, affine=True, track_running_stats=True).double()
images = 3 * torch.randn(5, 4, 8, 8, dtype=torch.float64) + 2
norm(images)  # for the running statistics


def ratios(training):
    norm.train(training)
    for parameter in norm.parameters():
        parameter.grad_sample = None
    right = [torch.autograd.grad(norm(images[[i]]).square().sum(), norm.weight)[0] for i in range(5)]
    outputs = call_for_per_sample_grads(norm, loss_reduction="sum")(images)
    if not training:
        torch.testing.assert_close(outputs, norm(images))
    outputs.square().sum().backward()
    return norm.weight.grad_sample / torch.stack(right)


training, evaluating = ratios(True), ratios(False)
print("found over right: training", training.min().item(), "to", training.max().item())
print("eval", evaluating.min().item(), "to", evaluating.max().item())
assert (training - 1).abs().max() < 1e-12
assert (evaluating - 1).abs().min() > 0.1, "the running statistics are used now"
PY
