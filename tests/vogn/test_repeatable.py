"""Two processes that do the same get the same, bit for bit."""

from __future__ import annotations

import subprocess
import sys

TRAIN = """
import hashlib, torch, persample
from torch import nn
torch.set_num_threads(2)
torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(3, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(864, 10))
x, y = torch.randn(16, 3, 28, 28), torch.arange(16) % 10
optimizer = persample.VOGN(
    model, persample.losses.cross_entropy, data_size=100, lr=1e-3, backend_options={"deterministic": True}
)
for _ in range(4):
    optimizer.observe(x, y)
    optimizer.step()
state = [*model.parameters(), *(s["curvature"] for s in optimizer.state.values())]
print(hashlib.sha256(b"".join(t.detach().numpy().tobytes() for t in state)).hexdigest())
"""


def test_a_deterministic_training_repeats_in_another_process() -> None:
    runs = [subprocess.run([sys.executable, "-c", TRAIN], capture_output=True, text=True, check=True) for _ in range(2)]
    assert len(runs[0].stdout) == 65
    assert runs[0].stdout == runs[1].stdout
