"""Lightning's own Trainer, as users call it: what it accumulates, scales, clips, saves and loads."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import persample
from persample.errors import OptionError, UsageError
from persample.testing.devices import generator_of

lightning = pytest.importorskip("lightning", reason="lightning is not installed: pip install lightning")

from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402
from lightning.pytorch.plugins import MixedPrecision  # noqa: E402

from persample.integrations.lightning import DrawWeights  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # of Lightning's, about loggers, workers and devices
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

GENERATOR = generator_of(1)
X, Y = torch.randn(50, 4, generator=GENERATOR), torch.randint(3, (50,), generator=GENERATOR)


class Net(lightning.LightningModule):
    def __init__(self, rule: Any = persample.VOGN, seed: int | None = 3, **settings: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        self.rule, self.settings = rule, {"data_size": 50, "lr": 0.05, **settings}
        if seed is not None:
            self.settings["generator"] = generator_of(seed)
        self.none_at: set[int] = set()
        self.raise_at: int | None = None
        self.outputs: list[Tensor] = []

    def training_step(self, batch: Any, index: int) -> Tensor | None:
        if index == self.raise_at:
            raise KeyError("in the training step")
        return None if index in self.none_at else F.cross_entropy(self.model(batch[0]), batch[1])

    def test_step(self, batch: Any, index: int) -> None:
        self.outputs.append(self.posterior.predict(batch[0], samples=4, generator=generator_of(5)).probabilities)

    def configure_optimizers(self) -> Any:
        self.posterior = self.rule(self.model, **self.settings)
        scheduler = torch.optim.lr_scheduler.StepLR(self.posterior, 1, gamma=0.5)
        return {"optimizer": self.posterior, "lr_scheduler": scheduler}


def fit(
    net: Net, batch_size: int, *, callbacks: Any = (), ckpt_path: Any = None, shuffle: bool = False, **settings: Any
) -> Any:
    defaults = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = lightning.Trainer(**(defaults | settings), callbacks=[DrawWeights(), *callbacks])
    trainer.fit(net, DataLoader(TensorDataset(X, Y), batch_size, shuffle=shuffle), ckpt_path=ckpt_path)
    return trainer


def end(net: Net) -> list[Tensor]:
    return [*(p.detach().clone() for p in net.parameters()), *net.posterior._precision()]


def assert_same(one: Net, other: Net, **tolerances: float) -> None:
    assert one.posterior.steps == other.posterior.steps
    for a, b in zip(end(one), end(other), strict=True):
        torch.testing.assert_close(a, b, **({"rtol": 1e-4, "atol": 1e-6} | tolerances))


@pytest.mark.parametrize("rule", [persample.VOGN, persample.IVON, persample.Vadam])
@pytest.mark.parametrize(("whole", "part", "parts"), [(20, 5, 4), (16, 8, 2), (24, 8, 3)])
def test_accumulated_batches_are_one_large_batch(rule: Any, whole: int, part: int, parts: int) -> None:
    """Also at the end of an epoch, where there are fewer parts, and the last one is smaller."""
    one, other = Net(rule), Net(rule)
    fit(one, whole)
    fit(other, part, accumulate_grad_batches=parts)
    assert_same(one, other)


def test_the_trainer_clips_the_accumulated_gradient() -> None:
    one, other, unclipped = Net(), Net(), Net()
    for net, size, parts, value in ((one, 25, 1, 0.05), (other, 5, 5, 0.05), (unclipped, 25, 1, None)):
        fit(net, size, accumulate_grad_batches=parts, gradient_clip_val=value)
    assert_same(one, other)
    assert (one.model[0].weight - unclipped.model[0].weight).abs().max() > 1e-3


@pytest.mark.parametrize("parts", [1, 2])
def test_a_gradient_scaler(parts: int) -> None:
    scaled, plain = Net(), Net()
    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=1024.0))
    fit(scaled, 10, accumulate_grad_batches=parts, plugins=[plugin], gradient_clip_val=1.0)
    fit(plain, 10, accumulate_grad_batches=parts, gradient_clip_val=1.0)
    assert_same(scaled, plain, rtol=0.05, atol=0.02)  # float16 inside
    assert scaled.posterior.skipped_steps == 0
    assert scaled.posterior._step_supports_amp_scaling


@pytest.mark.parametrize("seed", [3, None])
@pytest.mark.parametrize("parts", [1, 2])
def test_a_resumed_training_is_the_uninterrupted_one_bit_for_bit(seed: int | None, parts: int, tmp_path: Path) -> None:
    """With a generator of the optimizer, and with PyTorch's own random numbers, which Lightning does not save."""
    settings = {"max_epochs": 4, "accumulate_grad_batches": parts, "shuffle": seed is None}
    whole = Net(seed=seed)
    checkpoint = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    torch.manual_seed(8)
    fit(whole, 10, enable_checkpointing=True, callbacks=[checkpoint], **settings)
    resumed = Net(seed=seed)
    torch.manual_seed(9)
    fit(resumed, 10, ckpt_path=tmp_path / "epoch=1.ckpt", **settings)
    assert_same(whole, resumed, rtol=0, atol=0)


def test_what_is_tested_is_the_posterior_of_the_checkpoint(tmp_path: Path) -> None:
    """Not its mean with the precision of the last step."""
    net, early = Net(), Net()
    checkpoint = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    trainer = fit(net, 10, max_epochs=3, enable_checkpointing=True, callbacks=[checkpoint])
    fit(early, 10, max_epochs=1)
    trainer.test(net, DataLoader(TensorDataset(X, Y), 50), ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False)
    due = early.posterior.predict(X, samples=4, generator=generator_of(5)).probabilities
    torch.testing.assert_close(net.outputs[0], due, rtol=0, atol=0)


def test_a_batch_without_a_loss_is_left_out() -> None:
    """The step is that of the other part."""
    net, due = Net(), Net()
    net.none_at = {1}
    fit(net, 25, accumulate_grad_batches=2, max_epochs=1)
    due.configure_optimizers()
    with due.posterior.sampled_params(train=True):
        F.cross_entropy(due.model(X[:25]), Y[:25]).backward()
    due.posterior.step()
    assert_same(net, due)
    net.none_at = {0, 3}
    fit(net, 10, accumulate_grad_batches=2, max_epochs=1)
    assert net.posterior.steps == 3


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("mc_samples", [1, 2])
def test_a_step_without_a_loss_is_left_out(parts: int, mc_samples: int) -> None:
    """As if these batches were not there; also where the model was called before None was returned."""
    if parts * mc_samples == 4:
        pytest.skip("several draws need a closure")

    class Late(Net):
        def training_step(self, batch: Any, index: int) -> Tensor | None:
            at, self.none_at = self.none_at, set()
            loss, self.none_at = super().training_step(batch, index), at
            return None if index in at else loss

    due = Net(mc_samples=mc_samples)
    due.configure_optimizers()
    for rows in (slice(0, 10 * parts), slice(20, 20 + 10 * parts)):
        for _ in range(mc_samples):
            with due.posterior.sampled_params(train=True):
                F.cross_entropy(due.model(X[rows]), Y[rows]).backward()
        due.posterior.step()
        due.posterior.zero_grad()
    for kind in (Net, Late):
        net = kind(mc_samples=mc_samples)
        net.none_at = {1, 3, 4} if parts == 1 else {4}
        fit(net, 10, accumulate_grad_batches=parts, max_epochs=1)
        assert_same(net, due)


def test_a_module_without_forward_is_named() -> None:
    class Whole(Net):
        def configure_optimizers(self) -> Any:
            self.posterior = persample.VOGN(self, data_size=50)
            return self.posterior

    net = Whole()
    net.configure_optimizers()
    with pytest.raises(UsageError, match=r"missing the required .forward. function: pass the module that your code"):
        net.posterior.predict(X)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch was built without torch.distributed")
def test_two_processes_are_those_of_a_plain_loop(tmp_path: Path) -> None:
    script = Path(__file__).with_name("lightning_ranks.py")
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ran = subprocess.run(
        [*start, str(script), str(tmp_path)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert ran.returncode == 0, ran.stderr
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert first["steps"] == second["steps"] == 4
    for found in (first, second):
        assert "process_group=torch.distributed.group.WORLD in configure_optimizers()" in found.pop("error")
    assert not torch.equal(first.pop("seen"), second.pop("seen"))
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=0, atol=0)
        torch.testing.assert_close(value, first[name.replace("lightning", "hand")], rtol=1e-4, atol=1e-6)


def test_a_step_that_overflowed_is_forgotten() -> None:
    net = Net()
    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=3e38))
    fit(net, 10, accumulate_grad_batches=2, plugins=[plugin], gradient_clip_val=1.0, max_epochs=30)
    assert net.posterior.skipped_steps > 0
    assert net.posterior.steps + net.posterior.skipped_steps == 90
    assert all(bool(p.isfinite().all()) for p in net.parameters())


@pytest.mark.parametrize("parts", [1, 2])
def test_after_an_error_the_model_has_its_mean(parts: int) -> None:
    net = Net()
    net.raise_at = 1
    mean = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(KeyError, match="in the training step"):
        fit(net, 10, accumulate_grad_batches=parts)
    if parts == 2:  # no step was made
        assert all(torch.equal(p, before) for p, before in zip(net.parameters(), mean, strict=True))
    with net.posterior.sampled_params():  # which is refused inside of another block
        pass


def test_several_draws_need_a_closure() -> None:
    fit(Net(mc_samples=2), 10)
    with pytest.raises(OptionError, match=r"mc_samples=2.*accumulate_grad_batches"):
        fit(Net(mc_samples=2), 10, accumulate_grad_batches=2)


def test_other_optimizers_are_left_alone() -> None:
    class Adam(Net):
        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters())

    fit(Adam(), 10, accumulate_grad_batches=2)


def test_manual_optimisation_is_left_alone() -> None:
    class Manual(Net):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, index: int) -> None:
            optimizer = self.optimizers()
            with self.posterior.sampled_params(train=True):
                self.manual_backward(F.cross_entropy(self.model(batch[0]), batch[1]))
            optimizer.step()
            optimizer.zero_grad()

    net = Manual()
    fit(net, 10)
    assert net.posterior.steps == 10
