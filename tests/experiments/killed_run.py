"""A training run that is killed at random moments and resumed until it is done; started by the tests.

    python killed_run.py FOLDER

Writes `straight.pt`, the last checkpoint of a run that nobody killed, `killed.pt`, that of the other, and `kills`.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from persample.experiments.checkpoint import restore
from persample.experiments.data import ImageDataset
from persample.experiments.recipes import configure
from persample.experiments.run import start
from persample.experiments.train import train
from persample.sources.backends.fused.replay import replay, untried
from persample.testing.devices import generator_of
from persample.vogn import VOGN


def dataset() -> ImageDataset:
    generator = generator_of(0)
    inputs, targets = torch.randn(60, 1, 28, 28, generator=generator), torch.randint(10, (60,), generator=generator)
    return ImageDataset("mnist-5k", inputs[:40], targets[:40], inputs[40:], targets[40:], num_classes=10)


def train_in_a_child(checkpoint: Path) -> int:
    """Begin, or go on from the checkpoint, in a process of its own, whose id is returned."""
    child = os.fork()
    if child:
        return child
    torch.set_num_threads(1)
    replay._CALLS, replay._SECONDS = 3, 0.0  # a step is recorded at another time in each process
    config = configure("mnist-5k", "vogn", epochs=10, batch_size=8, mc_samples=2, train_draws=1, test_draws=1)
    run = start(config, 40)
    if checkpoint.exists():
        restore(run, checkpoint)
    train(run, dataset(), checkpoint)
    assert isinstance(run.optimizer, VOGN)
    if checkpoint.name == "straight.pt" and untried.DYNAMO_SEES_CHANGES:
        assert run.optimizer.source.ran == "replayed"
    os._exit(0)


def main(folder: Path) -> None:
    began = time.monotonic()
    assert os.waitpid(train_in_a_child(folder / "straight.pt"), 0)[1] == 0
    whole = time.monotonic() - began
    kills, random_number = 0, random.Random(0).random
    while True:
        child = train_in_a_child(folder / "killed.pt")
        time.sleep(random_number() * 0.6 * whole)
        if kills < 4:
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        if status == 0 and kills >= 3:
            break
        if status == 0:  # it was done before it could be killed, because the machine had been slow: begin again
            (folder / "killed.pt").unlink()
            kills, whole = 0, whole / 2
            continue
        assert os.WTERMSIG(status) == signal.SIGKILL
        kills += 1
    (folder / "kills").write_text(str(kills))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
