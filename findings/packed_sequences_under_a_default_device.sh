#!/usr/bin/env bash
# torch 2.13.0: pack_sequence makes the lengths on the default device and then refuses them there, because they must be on the
# CPU. So with torch.set_default_device("cuda") no batch of sequences can be packed; "meta" stands for a GPU here.
# Seen: RuntimeError: 'lengths' argument should be a 1D CPU int64 tensor, but got 1D meta Long tensor.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
"$folder/venv/bin/python" -W ignore - <<'PY'
import torch
from torch.nn.utils.rnn import pack_sequence

sequences = [torch.zeros(2, 3), torch.zeros(1, 3)]
assert pack_sequence(sequences).batch_sizes.tolist() == [2, 1]
torch.set_default_device("meta")
try:
    pack_sequence([torch.zeros(2, 3), torch.zeros(1, 3)])
except RuntimeError as error:
    print("RuntimeError:", error)
    assert "should be a 1D CPU int64 tensor" in str(error)
else:
    raise SystemExit("it packs now")
PY
