#!/usr/bin/env bash
# torch 2.13.0: a hook of Tensor.register_post_accumulate_grad_hook also runs where the backward pass has no gradient for the
# parameter: a custom Function returns None for it, the parameter's .grad stays as it was, and the hook is called all the same.
# An optimizer step or a per-sample product inside such a hook uses the gradient of an earlier pass once more.
# Seen: two calls, with .grad None and with the old .grad of 3.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
"$folder/venv/bin/python" -W ignore - <<'PY'
import torch


class Frozen(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        return x * w

    @staticmethod
    def backward(ctx, delta):
        return delta, None  # no gradient for w


w = torch.nn.Parameter(torch.tensor(2.0))
x = torch.tensor(3.0, requires_grad=True)
seen = []
w.register_post_accumulate_grad_hook(lambda p: seen.append(None if p.grad is None else p.grad.item()))
Frozen.apply(x, w).backward()
w.grad = torch.tensor(3.0)
Frozen.apply(x, w).backward()
print("the hook saw", seen)
assert seen == [None, 3.0], "it runs only with a gradient now"
PY
