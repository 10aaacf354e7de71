#!/usr/bin/env bash
# torch 2.13.0: a compiled function that walks over an OrderedDict from outside goes on with the old order after move_to_end, because
# the guards on it look at its keys as a set. Nothing is recompiled, and the result is that of the old order.
# Seen: 23.0 in place of 32.0.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy
"$folder/venv/bin/python" -W ignore - <<'PY'
from collections import OrderedDict

import torch

DIGITS = OrderedDict(a=2.0, b=3.0)


def read(x):
    for digit in DIGITS.values():
        x = 10 * x + digit
    return x


compiled = torch.compile(read, backend="eager")
before = compiled(torch.zeros(())).item()
DIGITS.move_to_end("a")
after, right = compiled(torch.zeros(())).item(), read(torch.zeros(())).item()
print("before", before, "after", after, "right", right)
assert (after, right) == (23.0, 32.0), "Dynamo guards the order now"
PY
