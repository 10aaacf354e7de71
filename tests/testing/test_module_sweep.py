"""PyTorch's own modules are exact or refused; the search for the samples in their arguments finds them."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

from persample.testing import Candidate
from persample.testing.module_sweep import sweep
from persample.testing.module_sweep.arrangement import Call, MixesError, arrange


@pytest.mark.parametrize("backend", ["fused", "hooks"])
def test_no_module_of_the_list_is_wrong(backend: str) -> None:
    findings = list(sweep([Candidate(backend)], most=2))
    assert [f for f in findings if f.kind in ("wrong", "caught")] == []
    kinds = Counter(f.kind for f in findings)
    assert kinds["exact"] > len(findings) / 2
    assert kinds["not applicable"] < len(findings) / 10


X = torch.randn(2, 3, 4, dtype=torch.float64)
STATE = torch.randn(1, 5, dtype=torch.float64)


@pytest.mark.parametrize(
    ("module", "args", "dims", "results"),
    [
        (nn.Linear(4, 5), (X,), (0,), (0,)),
        (nn.RNN(4, 5), (X,), (1,), (1, 1)),
        (nn.RNN(4, 5, batch_first=True), (X,), (0,), (0, 1)),
        (nn.GRU(4, 5), (X[0], STATE), (1, 1), (1, 1)),
        (nn.GRU(4, 5, batch_first=True), (X[0], STATE), (0, 1), (0, 1)),
        (nn.Conv1d(3, 2, 2), (X[0],), (0,), (0,)),
        (nn.Softmax(-1), (X[0, 0],), (0,), (0,)),
    ],
)
def test_the_samples_are_found(
    module: nn.Module, args: tuple[torch.Tensor, ...], dims: object, results: object
) -> None:
    module = module.double()
    arrangement = arrange(module, Call(args, {}))
    assert (arrangement.dims, arrangement.results) == (dims, results)
    rows = [
        arrangement.outputs(module, [x[i : i + 1] for x in arrangement.batch]) for i in range(len(arrangement.batch[0]))
    ]
    torch.testing.assert_close(torch.cat(rows), arrangement.outputs(module, arrangement.batch))


def test_mixing_is_found() -> None:
    with pytest.raises(MixesError):
        arrange(nn.BatchNorm1d(3).double(), Call((X,), {}))
