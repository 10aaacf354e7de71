#!/usr/bin/env bash
# torch 2.13.0: torch.distributed.checkpoint.state_dict cannot load what it saved when both full_state_dict and
# flatten_optimizer_state_dict are asked for, for any optimizer (here Adam on one process).
# Seen: KeyError: 'param_groups.0.params.0'. Each of the two options alone works.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
"$folder/venv/bin/python" -W ignore - <<'PY'
import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

model = torch.nn.Linear(3, 3)
optimizer = torch.optim.Adam(model.parameters())
model(torch.ones(2, 3)).sum().backward()
optimizer.step()


def round_trip(**options):
    options = StateDictOptions(**options)
    weights, state = get_state_dict(model, optimizer, options=options)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state, options=options)


round_trip(full_state_dict=True)
round_trip(flatten_optimizer_state_dict=True)
try:
    round_trip(full_state_dict=True, flatten_optimizer_state_dict=True)
except KeyError as error:
    print("KeyError:", error)
    assert "param_groups.0.params.0" in str(error)
else:
    raise SystemExit("the round trip works now")
PY
