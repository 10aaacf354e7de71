#!/usr/bin/env bash
# torch 2.13.0: a compiled function that asks for a missing key or attribute and catches KeyError or AttributeError goes on with
# that branch after the key or attribute has come, because nothing guards what is absent there. The same question by `in`, or by
# getattr with a default, is guarded and compiled anew.
# Seen: -1.0 in place of 5.0 for both exceptions; 5.0 for `in` and getattr.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PY'
import torch


class Shifted(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.options = {"other": 0.0}


class CatchesKey(Shifted):
    def forward(self, x):
        try:
            return x + self.options["shift"]
        except KeyError:
            return x - 1


class CatchesAttribute(Shifted):
    def forward(self, x):
        try:
            return x + self.shift
        except AttributeError:
            return x - 1


class AsksForKey(Shifted):
    def forward(self, x):
        return x + self.options["shift"] if "shift" in self.options else x - 1


class AsksForAttribute(Shifted):
    def forward(self, x):
        return x + getattr(self, "shift", -1.0)


def before_and_after(kind):
    model, x = kind(), torch.zeros(())
    compiled = torch.compile(model, backend="eager")
    before = compiled(x).item()
    model.options["shift"] = 5.0
    model.register_buffer("shift", torch.tensor(5.0))
    assert model(x).item() == 5.0
    return before, compiled(x).item()


found = {kind.__name__: before_and_after(kind) for kind in (CatchesKey, CatchesAttribute, AsksForKey, AsksForAttribute)}
print(found)
assert found["AsksForKey"] == found["AsksForAttribute"] == (-1.0, 5.0)
assert found["CatchesKey"] == found["CatchesAttribute"] == (-1.0, -1.0), "Dynamo guards what is absent now"
PY
