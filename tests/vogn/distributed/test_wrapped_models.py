"""Models that are spread over processes or devices are refused in words, with the way to go."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from persample import make_source
from persample.errors import OptionError, UnsupportedModelError, UsageError
from persample.losses import cross_entropy
from persample.vogn import IVON, OGN, VOGN, MeanFieldVI, SeparateProcessesWarning, Vadam
from persample.vogn.distributed import warn_of_separate_processes

RULES = [VOGN, OGN, IVON, Vadam, MeanFieldVI]


@pytest.fixture
def group() -> Any:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.fixture
def mesh(group: Any) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (1,))


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


@pytest.mark.parametrize("rule", RULES)
class TestReplicas:
    def way(self, rule: Any) -> str:
        return (
            r"\(its \.module\).*process_group=torch.distributed"
            if issubclass(rule, VOGN | IVON)
            else "VOGN, OGN or IVON"
        )

    def test_a_wrapped_model(self, rule: Any, group: Any) -> None:
        with pytest.raises(OptionError, match=rf"^The model \(DistributedDataParallel\) .*{self.way(rule)}"):
            rule(DistributedDataParallel(network()), cross_entropy, data_size=10)

    def test_a_wrapped_part(self, rule: Any, group: Any) -> None:
        model = nn.Sequential(DistributedDataParallel(network()), nn.Linear(2, 2))
        with pytest.raises(OptionError, match=r"^DistributedDataParallel '0' "):
            rule(model, cross_entropy, data_size=10)

    def test_a_compiled_wrapper(self, rule: Any, group: Any) -> None:
        with pytest.raises(OptionError, match="DistributedDataParallel '_orig_mod' "):
            rule(torch.compile(DistributedDataParallel(network())), cross_entropy, data_size=10)

    def test_a_wrapper_around_the_model_that_was_given(self, rule: Any, group: Any) -> None:
        """Its reducer never sees the gradients of the samples."""
        model = network()
        optimizer, wrapper = rule(model, cross_entropy, data_size=10), DistributedDataParallel(model)
        x, y = torch.randn(5, 3), torch.tensor([0, 1, 0, 1, 1])
        with (
            pytest.raises(UsageError, match=rf"called by a DistributedDataParallel.*{self.way(rule)}"),
            optimizer.sampled_params(train=True),
        ):
            F.cross_entropy(wrapper(x), y).backward()
        assert not model._forward_pre_hooks
        with optimizer.sampled_params():
            wrapper(x)
        with optimizer.sampled_params(train=True):
            F.cross_entropy(model(x), y).backward()

    def test_several_devices(self, rule: Any) -> None:
        with pytest.raises(OptionError, match=r"\(DataParallel\) splits batches over devices.*its \.module"):
            rule(DataParallel(network()), cross_entropy, data_size=10)


@pytest.mark.parametrize("rule", RULES)
class TestSharded:
    def test_fully_shard(self, rule: Any, mesh: Any) -> None:
        from torch.distributed.fsdp import fully_shard

        model = network()
        fully_shard(model[2], mesh=mesh)
        with pytest.raises(
            UnsupportedModelError, match=r"^Parameter '2\.weight' is part of a tensor sharded .*fully_shard.*unsharded"
        ):
            rule(model, cross_entropy, data_size=10)

    def test_fsdp(self, rule: Any, group: Any) -> None:
        from torch.distributed.fsdp import FullyShardedDataParallel

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch announces its successor
            model = FullyShardedDataParallel(network(), device_id=torch.device("cpu"))
        with pytest.raises(UnsupportedModelError, match=r"^The model \(FullyShardedDataParallel\) is part"):
            rule(model, cross_entropy, data_size=10)

    def test_tensor_parallel(self, rule: Any, mesh: Any) -> None:
        from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

        model = network()
        parallelize_module(model, mesh, {"0": ColwiseParallel()})
        with pytest.raises(UnsupportedModelError, match=r"^Parameter '0\.weight' is part of a tensor sharded"):
            rule(model, cross_entropy, data_size=10)


@pytest.mark.parametrize("backend", ["loop", "vmap", "fused", "hooks"])
def test_sources_refuse_sharded_parameters_too(backend: str, mesh: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    model = network()
    fully_shard(model, mesh=mesh)
    with pytest.raises(UnsupportedModelError, match=r"'0\.weight' is part of a tensor sharded"):
        make_source(backend, model, cross_entropy).moments(torch.randn(5, 3), torch.tensor([0, 1, 0, 1, 1]))


class TestSeparateProcesses:
    def test_of_a_group_without_saying_so(self, group: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(dist, "get_world_size", lambda: 3)  # what matters is what PyTorch answers
        for rule in RULES:
            with pytest.warns(SeparateProcessesWarning, match="3 processes run.*process_group"):
                rule(network(), cross_entropy, data_size=10)

    def test_before_the_group_is_made(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """group.WORLD is None until then."""
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "some")
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.warns(SeparateProcessesWarning, match=r"init_process_group\(\) first"):
            VOGN(network(), cross_entropy, data_size=10, process_group=dist.group.WORLD)

    def test_one_alone_is_not_warned(self, group: Any) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warn_of_separate_processes()
            VOGN(network(), cross_entropy, data_size=10)
            VOGN(network(), cross_entropy, data_size=10, process_group=group)

    def test_what_is_no_group(self) -> None:
        for other in ("world", 2, dist):
            with pytest.raises(OptionError, match=r"process_group=.*must be a group"):
                VOGN(network(), cross_entropy, data_size=10, process_group=other)  # type: ignore[arg-type]
