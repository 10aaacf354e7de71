#!/usr/bin/env bash
# torch 2.13.0: torch.compile with a backend that is not Inductor (here "eager") all the same writes TORCHINDUCTOR_CACHE_DIR into
# the environment of the process, as if the user had set it. Child processes inherit it: one that is given a temporary folder of
# its own, as by a scheduler, still has its caches in that of the parent.
# Seen: the variable set after one call; a child with another TMPDIR names the parent's folder.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
mkdir "$folder/parent" "$folder/child"
cd "$folder"
unset TORCHINDUCTOR_CACHE_DIR
TMPDIR="$folder/parent" "$folder/venv/bin/python" -W ignore - <<'PY'
import os
import subprocess
import sys

import torch

PRINT = "from torch._inductor.runtime.cache_dir_utils import cache_dir; print(cache_dir())"


def folder_of_a_child():
    child = {**os.environ, "TMPDIR": os.path.abspath("child")}
    return subprocess.run([sys.executable, "-c", PRINT], env=child, check=True, text=True, capture_output=True).stdout.strip()


before = folder_of_a_child()
torch.compile(lambda x: x + 1, backend="eager")(torch.zeros(2))
after = folder_of_a_child()
print("before", before, "after", after, "set to", os.environ.get("TORCHINDUCTOR_CACHE_DIR"))
assert before.startswith(os.path.abspath("child"))
assert after == os.environ.get("TORCHINDUCTOR_CACHE_DIR"), "the environment is left alone now"
assert after.startswith(os.path.abspath("parent"))
PY
