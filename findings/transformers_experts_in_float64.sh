#!/usr/bin/env bash
# transformers 5.24.0 with torch 2.13.0 on a CPU: a model with experts (Mixtral here) that is turned to float64, as one does to
# check gradients, raises in its forward pass, although nothing in its configuration asks for a kernel: the default of its experts is
# torch's grouped matrix product, which knows float32, bfloat16 and float16. With experts_implementation="eager" it works.
# Seen: RuntimeError: Expected mat_a to be Float32, BFloat16 or Float16 matrix, got Double
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.24.0
"$folder/venv/bin/python" -W ignore - <<'PY'
import torch
from transformers import MixtralConfig, MixtralForCausalLM


def loss(dtype, **settings):
    config = MixtralConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
        max_position_embeddings=16,
        **settings,
    )
    model = MixtralForCausalLM(config).to(dtype)
    words = torch.randint(32, (2, 8))
    return model(words, labels=words).loss


print("float32", loss(torch.float32).item(), "float64, eager", loss(torch.float64, experts_implementation="eager").item())
try:
    loss(torch.float64)
except RuntimeError as error:
    print("float64:", error)
    assert "got Double" in str(error)
else:
    raise AssertionError("experts work in float64 now")
PY
