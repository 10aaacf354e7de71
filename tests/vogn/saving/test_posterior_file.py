"""Saving and loading a posterior: the same numbers come back, and garbage is refused."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from persample import Posterior
from persample.errors import DataError, OptionError, UsageError
from persample.testing.devices import generator_of
from persample.vogn import VOGN

safetensors = pytest.importorskip("safetensors.torch")


@pytest.fixture
def saved(vogn: VOGN, train: Callable[..., None], tmp_path: Path) -> tuple[Posterior, Path]:
    train(vogn)
    posterior, path = vogn.posterior, tmp_path / "posterior.safetensors"
    posterior.save(path)
    return posterior, path


def rewrite(
    path: Path, change: Callable[[dict[str, Tensor]], None] = lambda tensors: None, **header: str | None
) -> None:
    """Change tensors and header of a file; a header entry of None is removed."""
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = {**file.metadata(), **header}
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    change(tensors)
    safetensors.save_file(tensors, path, metadata={key: value for key, value in metadata.items() if value is not None})


def test_the_same_posterior_comes_back(
    saved: tuple[Posterior, Path], model: nn.Module, batch: tuple[Tensor, Tensor]
) -> None:
    posterior, path = saved
    loaded = Posterior.load(path, model)
    assert list(loaded.mean) == list(posterior.mean)
    for name in posterior.mean:
        assert torch.equal(loaded.mean[name], posterior.mean[name])
        assert torch.equal(loaded.precision[name], posterior.precision[name])
    first, second = (p.predict(batch[0], generator=generator_of(0)) for p in (posterior, loaded))
    assert torch.equal(first.probabilities, second.probabilities)


def test_it_goes_where_the_model_is(saved: tuple[Posterior, Path], model: nn.Module) -> None:
    elsewhere = copy.deepcopy(model).to("meta")
    loaded = Posterior.load(saved[1], elsewhere)
    for table in (loaded.mean, loaded.precision):
        assert {value.device.type for value in table.values()} == {"meta"}
    assert {value.device.type for value in Posterior.load(saved[1], elsewhere, device="cpu").mean.values()} == {"cpu"}


def test_the_order_of_the_parameters_is_kept(tmp_path: Path) -> None:
    names = ["z", "a", "m.weight"]
    posterior = Posterior({name: torch.randn(2) for name in names}, {name: torch.ones(2) for name in names})
    posterior.save(tmp_path / "file")
    assert list(Posterior.load(tmp_path / "file").mean) == names


def test_a_pruned_posterior_comes_back(saved: tuple[Posterior, Path], tmp_path: Path) -> None:
    pruned = saved[0].prune(0.5)
    pruned.save(tmp_path / "pruned")
    loaded = Posterior.load(tmp_path / "pruned", device=torch.get_default_device())
    assert all(torch.equal(loaded.precision[name], value) for name, value in pruned.precision.items())


def test_views_dtypes_and_scalars_come_back(tmp_path: Path) -> None:
    mean = {"t": torch.arange(6.0).view(2, 3).t(), "s": torch.tensor(2.0, dtype=torch.float64)}
    precision = {"t": torch.ones(1).expand(3, 2), "s": torch.tensor(3.0, dtype=torch.float64)}
    Posterior(mean, precision).save(tmp_path / "file")
    loaded = Posterior.load(tmp_path / "file", device=torch.get_default_device())
    for name, value in mean.items():
        torch.testing.assert_close(loaded.mean[name], value, rtol=0, atol=0)


def test_without_a_model_nothing_is_predicted(saved: tuple[Posterior, Path], batch: tuple[Tensor, Tensor]) -> None:
    with pytest.raises(UsageError, match=r"Posterior\.load"):
        Posterior.load(saved[1]).predict(batch[0])


class TestGarbage:
    """Each is refused by an error that names the file."""

    def refused(self, path: Path, match: str) -> None:
        with pytest.raises(DataError, match=match) as caught:
            Posterior.load(path)
        assert str(path) in str(caught.value)

    def test_no_file(self, tmp_path: Path) -> None:
        self.refused(tmp_path / "nothing", "does not exist")

    def test_a_folder(self, tmp_path: Path) -> None:
        self.refused(tmp_path, "cannot be read")

    @pytest.mark.skipif(os.name != "posix", reason="pipes of POSIX")
    def test_a_pipe(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        self.refused(tmp_path / "pipe", "cannot be read")

    @pytest.mark.parametrize("device", ["nonsense", "cuda:99"])
    def test_no_such_device(self, saved: tuple[Posterior, Path], device: str) -> None:
        with pytest.raises(OptionError, match=f"device='{device}': there is no such device"):
            Posterior.load(saved[1], device=device)

    @pytest.mark.parametrize("content", [b"", b"garbage" * 20, b"\x00" * 64])
    def test_other_bytes(self, content: bytes, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(content)
        self.refused(tmp_path / "file", "cannot be read")

    @pytest.mark.parametrize("length", [0.2, 0.7, 0.99])
    def test_half_a_file(self, length: float, saved: tuple[Posterior, Path]) -> None:
        content = saved[1].read_bytes()
        saved[1].write_bytes(content[: int(length * len(content))])
        self.refused(saved[1], "cannot be read")

    def test_tensors_of_something_else(self, tmp_path: Path) -> None:
        safetensors.save_file({"weight": torch.zeros(2)}, tmp_path / "file")
        self.refused(tmp_path / "file", "not a posterior")

    def test_another_version(self, saved: tuple[Posterior, Path]) -> None:
        rewrite(saved[1], version="2")
        self.refused(saved[1], "version '2'")

    @pytest.mark.parametrize("names", ["", "{}", '["0.weight"]', json.dumps(["0.weight"] * 4), None])
    def test_a_header_of_other_tensors(self, names: str | None, saved: tuple[Posterior, Path]) -> None:
        rewrite(saved[1], parameters=names)
        self.refused(saved[1], "do not belong together")

    @pytest.mark.parametrize(
        ("key", "value", "match"),
        [
            ("precision/2.bias", torch.tensor([1.0, 0.0], dtype=torch.float64), "precision <= 0"),
            ("precision/2.bias", torch.tensor([1.0, torch.nan], dtype=torch.float64), "precision <= 0"),
            ("mean/2.bias", torch.tensor([1.0, torch.inf], dtype=torch.float64), "not finite"),
            ("mean/2.bias", torch.zeros(3, dtype=torch.float64), "types or shapes"),
            ("mean/2.bias", torch.zeros(2), "types or shapes"),
        ],
    )
    def test_impossible_values(self, key: str, value: Tensor, match: str, saved: tuple[Posterior, Path]) -> None:
        rewrite(saved[1], lambda tensors: tensors.update({key: value}))
        self.refused(saved[1], match)


class TestNotWritten:
    def test_the_folder_does_not_exist(self, saved: tuple[Posterior, Path], tmp_path: Path) -> None:
        with pytest.raises(DataError, match="cannot be written"):
            saved[0].save(tmp_path / "no" / "file")

    def test_nothing_is_left_where_a_folder_is_in_the_way(self, saved: tuple[Posterior, Path], tmp_path: Path) -> None:
        (tmp_path / "folder").mkdir()
        before = sorted(tmp_path.iterdir())
        with pytest.raises(DataError, match="cannot be written"):
            saved[0].save(tmp_path / "folder")
        assert sorted(tmp_path.iterdir()) == before

    @pytest.mark.skipif(os.name != "posix", reason="pipes of POSIX")
    def test_a_pipe_stays(self, saved: tuple[Posterior, Path], tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(DataError, match="cannot be written: it is a pipe"):
            saved[0].save(tmp_path / "pipe")
        assert (tmp_path / "pipe").is_fifo()

    def test_a_name_that_no_file_can_have(self, saved: tuple[Posterior, Path], tmp_path: Path) -> None:
        with pytest.raises(DataError, match="cannot be written"):
            saved[0].save(f"{tmp_path}/a\0b")


@pytest.mark.skipif(os.name != "posix", reason="links of POSIX")
def test_through_a_link_its_target_is_written(saved: tuple[Posterior, Path], tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(saved[1])
    saved[0].prune(0.5).save(link)
    assert link.is_symlink()
    assert all(
        torch.equal(mean, saved[0].prune(0.5).mean[name])
        for name, mean in Posterior.load(saved[1], device=torch.get_default_device()).mean.items()
    )
