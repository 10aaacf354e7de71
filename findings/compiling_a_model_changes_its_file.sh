#!/usr/bin/env bash
# torch 2.13.0: torch.compile, also with backend="eager", leaves an attribute on each parameter and buffer of a module, and
# pickles keep it: torch.save(model) writes another, longer file for the same weights after one call, and the tensors that are
# read back carry it, too. A deep copy keeps it on buffers and loses it on parameters. Hashes of such files tell nothing of weights.
# Seen: `_dynamo_static_input_type` on 2 parameters and 3 buffers; a file longer by 6 %; none of it in torch.save(state_dict).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PY'
import copy
import io

import torch


def written(what):
    file = io.BytesIO()
    torch.save(what, file)
    return file.getvalue()


def marked(module):
    return [name for name, t in [*module.named_parameters(), *module.named_buffers()] if vars(t)]


model = torch.nn.BatchNorm1d(2).eval()
whole, state = written(model), written(model.state_dict())
assert written(model) == whole and not marked(model)
torch.compile(model, backend="eager")(torch.zeros(3, 2))
after = written(model)
loaded = torch.load(io.BytesIO(after), weights_only=False)
print("bytes before", len(whole), "and after", len(after), "marked", marked(model))
print("marked when read back", marked(loaded), "in a deep copy", marked(copy.deepcopy(model)))
assert written(model.state_dict()) == state
buffers = ["running_mean", "running_var", "num_batches_tracked"]
assert marked(model) == ["weight", "bias", *buffers], "nothing is left on the tensors now"
assert len(after) > len(whole) and marked(loaded) == marked(model) and marked(copy.deepcopy(model)) == buffers
PY
