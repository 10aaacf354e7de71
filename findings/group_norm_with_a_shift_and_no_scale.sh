#!/usr/bin/env bash
# torch 2.13.0: group_norm with a bias and no weight, which its signature allows, runs forward and fails in the backward pass,
# although batch_norm, instance_norm and layer_norm with the same arguments do not.
# Seen: RuntimeError: tensor does not have a device.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
"$folder/venv/bin/python" -W ignore - <<'PY'
import torch
import torch.nn.functional as F

x = torch.randn(2, 4, 3)


def gradient_of_shift(norm):
    shift = torch.zeros(4, requires_grad=True)
    norm(shift).sum().backward()
    return shift.grad.tolist()


assert gradient_of_shift(lambda b: F.batch_norm(x, None, None, None, b, training=True)) == [6.0] * 4
assert gradient_of_shift(lambda b: F.layer_norm(x.mT, (4,), None, b)) == [6.0] * 4
try:
    print(gradient_of_shift(lambda b: F.group_norm(x, 2, None, b)))
except RuntimeError as error:
    print("RuntimeError:", error)
    assert "does not have a device" in str(error)
else:
    raise SystemExit("it has a gradient now")
PY
