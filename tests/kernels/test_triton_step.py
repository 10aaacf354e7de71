"""The optimizer's step in Triton, against float64: on a GPU where there is one, else by Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are made, below
triton = pytest.importorskip("triton", reason="Triton is not installed, and there is none for this machine's wheels")
if DEVICE == "cpu":
    pytest.importorskip(
        "triton", minversion="3.7", reason="the interpreter of an older Triton does not run with NumPy 2.4"
    )

import persample  # noqa: E402
from persample.kernels import gpu, step  # noqa: E402
from persample.kernels.compiled import without_kernels  # noqa: E402
from persample.kernels.step import draw_  # noqa: E402
from persample.kernels.step_kinds import StepKernel, Update  # noqa: E402
from persample.kernels.triton import launch_step as kernels  # noqa: E402
from persample.kernels.triton.trial import largest_error  # noqa: E402

SIZES = (0, 1, 3, 127, 1023, 1024, 1025, 2049, 5000)  # around a block, and some blocks
DTYPES = [torch.float32, torch.float64]
UPDATES = [Update(m, c, o) for m in (False, True) for c in (False, True) for o in (False, True)]
SETTINGS = {
    "usual": (0.001, 0.1, 0.19, 0.0, 0.002, 0.0, 0.01, 0.05),
    "far": (0.7, 0.9, 1.0, 0.3, 0.0, -0.5, 2.0, 1.0),
    "nothing moves": (0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0),
    "nothing stays": (1.0, 1.0, 1.0, 0.0, 0.5, 0.25, 0.5, 0.125),
}
CLIP = 0.3


def numbers(dtype: torch.dtype, *, positive: bool = False, sizes: tuple[int, ...] = SIZES) -> list[Tensor]:
    found = [torch.randn(size, dtype=dtype, device=DEVICE) for size in sizes]
    return [t.abs() + 0.1 for t in found] if positive else found


def within_rounding(found: list[Tensor], expected: list[Any], dtype: torch.dtype) -> None:
    for f, e in zip(found, expected, strict=True):
        tolerance = 1e-6 if dtype is torch.float32 else 1e-14
        np.testing.assert_allclose(f.cpu().numpy(), e, rtol=tolerance, atol=tolerance)


def exact(tensors: list[Tensor]) -> list[Any]:
    return [t.double().cpu().numpy() for t in tensors]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_draw_is_mean_plus_noise_over_root_of_precision(dtype: torch.dtype) -> None:
    mean, precision, noise = numbers(dtype), numbers(dtype, positive=True), numbers(dtype)
    weights = [torch.full_like(m, 7.0) for m in mean]
    kernels.draw(weights, mean, precision, noise)
    rows = zip(exact(mean), exact(precision), exact(noise), strict=True)
    within_rounding(weights, [m + e / np.sqrt(p) for m, p, e in rows], dtype)


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # of NumPy, with which the interpreter computes
def test_a_draw_keeps_what_is_not_finite() -> None:
    mean = torch.tensor([1.0, 1.0, 1.0, 1.0, torch.nan, torch.inf], device=DEVICE)
    precision = torch.tensor([0.0, -1.0, torch.inf, torch.nan, 1.0, 1.0], device=DEVICE)
    weights = torch.zeros_like(mean)
    kernels.draw([weights], [mean], [precision], [torch.ones_like(mean)])
    np.testing.assert_array_equal(weights.cpu(), [np.inf, np.nan, 1.0, np.nan, np.nan, np.inf])


@pytest.mark.parametrize("views", ["in order", "pieces of one tensor"])
def test_no_entry_beyond_a_tensor_is_written(views: str) -> None:
    sizes = (5, 1024, 3)
    wide = torch.full((3, 2000), 7.0, device=DEVICE)
    weights = [row[1 : 1 + size] for row, size in zip(wide, sizes, strict=True)]
    mean, precision = numbers(torch.float32, sizes=sizes), numbers(torch.float32, positive=True, sizes=sizes)
    noise = numbers(torch.float32, sizes=sizes)
    if views != "in order":
        noise = list(torch.cat(noise).split(sizes))
    kernels.draw(weights, mean, precision, noise)
    for row, w, m, p, e in zip(wide, weights, mean, precision, noise, strict=True):
        torch.testing.assert_close(w, m + e / p.sqrt())
        assert row[0] == 7.0
        assert (row[1 + len(w) :] == 7.0).all()


def updated(kind: Update, settings: tuple[float, ...], *operands: Any) -> tuple[Any, ...]:
    """Lines 6 and 7 for one tensor, in NumPy."""
    m, s, b, g, h = operands
    new_curvature, new_gradient, mass, averaged_prior, prior, prior_mean, shift, lr = settings
    updated = (1 - new_curvature) * s + new_curvature * h
    numerator = g + averaged_prior * (m - prior_mean)
    average = (1 - new_gradient) * b + new_gradient * numerator
    numerator = (average / mass if kind.has_momentum else numerator) + prior * (m - prior_mean)
    change = numerator / ((updated if kind.order_updated else s) + shift)
    return m - lr * (np.clip(change, -CLIP, CLIP) if kind.clips else change), updated, average


def by_kernel(kind: Update, settings: tuple[float, ...], *operands: list[Tensor]) -> list[list[Tensor]]:
    mean, curvature, momentum, gradient, squares = operands
    results = [[torch.full_like(m, 7.0) for m in mean] for _ in range(3)]
    kernels.update(
        (*settings, CLIP if kind.clips else float("inf"), float(kind.order_updated)),
        *(mean, curvature, momentum if kind.has_momentum else None, gradient, squares),
        *(results if kind.has_momentum else [*results[:2], []]),
    )
    return results


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("kind", UPDATES, ids=str)
def test_an_update_is_lines_6_and_7(kind: Update, name: str, dtype: torch.dtype) -> None:
    mean, momentum, gradient = numbers(dtype), numbers(dtype), numbers(dtype)
    operands = mean, numbers(dtype, positive=True), momentum, gradient, numbers(dtype, positive=True)
    before = [[t.clone() for t in tensors] for tensors in operands]
    found = by_kernel(kind, SETTINGS[name], *operands)
    rows = [updated(kind, SETTINGS[name], *row) for row in zip(*map(exact, operands), strict=True)]
    for result, expected in zip(found[: 3 if kind.has_momentum else 2], zip(*rows, strict=True), strict=False):
        within_rounding(result, list(expected), dtype)
    assert kind.has_momentum or all(bool((t == 7.0).all()) for t in found[2])
    for tensors, copies in zip(operands, before, strict=True):
        assert all(map(torch.equal, tensors, copies)), "the operands stay what they were"


@pytest.mark.parametrize("kind", UPDATES, ids=str)
def test_an_update_keeps_what_is_not_a_number(kind: Update) -> None:
    for place in range(5):
        if place == 2 and not kind.has_momentum:
            continue
        operands = [[torch.ones(3, device=DEVICE)] for _ in range(5)]
        operands[place][0][1] = torch.nan
        new_mean, new_curvature, _ = by_kernel(kind, SETTINGS["far"], *operands)
        of_mean = place != 4 or kind.order_updated
        assert new_mean[0].isnan().tolist() == [False, of_mean, False]
        assert new_curvature[0].isnan().tolist() == [False, place in (1, 4), False]


@pytest.mark.skipif(DEVICE == "cuda", reason="the kernels of CPUs take tensors of CPUs")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", UPDATES, ids=str)
def test_an_update_is_rounded_as_on_a_cpu(kind: Update, dtype: torch.dtype) -> None:
    operands = [numbers(dtype, positive=place in (1, 4)) for place in range(5)]
    mean, curvature, momentum, gradient, squares = operands
    new_curvature, new_gradient, mass, averaged_prior, prior, prior_mean, shift, lr = SETTINGS["far"]
    expected = step.update(
        *(mean, curvature, momentum if kind.has_momentum else None, gradient, squares),
        decay=1 - new_curvature,
        beta=1 - new_gradient,
        mass=mass,
        averaged_prior=averaged_prior,
        prior=prior,
        prior_mean=prior_mean,
        shift=shift,
        lr=lr,
        max_update=CLIP if kind.clips else None,
        order_updated=kind.order_updated,
    )
    if expected is None:
        pytest.skip("no C++ kernels")
    for found, truth in zip(by_kernel(kind, SETTINGS["far"], *operands), expected, strict=True):
        for f, t in zip(found, truth, strict=False):
            torch.testing.assert_close(f, t, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["draw", *UPDATES], ids=str)
def test_the_trial_before_the_first_use_passes(kind: StepKernel, dtype: torch.dtype) -> None:
    drawn = torch.get_rng_state()
    assert largest_error(kind, torch.device(DEVICE), dtype) < (1e-6 if dtype is torch.float32 else 1e-14)
    assert torch.equal(drawn, torch.get_rng_state())


OPTIONS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "as printed": {"momentum": 0.0, "temperature": 1.0},
    "clips": {"max_update": 0.02, "order": "updated"},
    "damped": {"damping": 0.1, "average_prior": True, "bias_correction": False, "prior_mean": 0.3},
    "warm-up": {"temperature_steps": 3, "augmentation": 2.0},
}


def trained(options: dict[str, Any], dtype: torch.dtype) -> persample.VOGN:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 3)).to(dtype)
    layers = [{"params": list(model[0].parameters()), "lr": 0.02}, {"params": list(model[2:].parameters())}]
    noise = torch.Generator().manual_seed(2)
    optimizer = persample.VOGN(
        model.to(DEVICE), persample.losses.cross_entropy, data_size=60, params=layers, generator=noise, **options
    )
    for _ in range(4):
        x = torch.randn(6, 4, generator=noise).to(DEVICE, dtype)
        optimizer.observe(x, torch.randint(3, (6,), generator=noise).to(DEVICE))
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("name", OPTIONS)
def test_training_with_the_kernels_is_training_without(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"hess_init": 0.5, "backend": "loop", **OPTIONS[name]}
    with without_kernels():
        expected = trained(options, torch.float32)
    calls: list[str] = []

    def noted(function: Callable[..., None], name: str) -> Callable[..., None]:
        return lambda *arguments, **kinds: (calls.append(name), function(*arguments, **kinds))[1]

    if DEVICE == "cpu":  # the kernels, interpreted, take the place of those of CPUs
        monkeypatch.setattr(step, "_updating_on_cpu", lambda *given: noted(kernels.update, "update"))
        monkeypatch.setattr("persample.vogn.optimizer.draw_", noted(kernels.draw, "draw"))
    found = trained(options, torch.float32)
    assert DEVICE == "cuda" or calls == ["draw", "update", "update"] * 4  # one update for each group
    for p, q in zip(found.model.parameters(), expected.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        for key, value in expected.state[q].items():
            torch.testing.assert_close(found.state[p][key], value, rtol=1e-5, atol=1e-6)


def test_what_the_kernels_do_not_take_is_left_to_pytorch() -> None:
    x = torch.ones(3, 4, device=DEVICE)
    others = {
        "a gap": x[:, ::2],
        "half precision": x.half(),
        "a CPU": x.cpu(),
        "another class": x.as_subclass(type("Own", (Tensor,), {})),
    }
    for tensor in others.values():
        assert gpu.step_kernels("draw", [tensor], [tensor], [tensor], [tensor]) is None
    assert gpu.step_kernels("draw", [x], [x.double()], [x], [x]) is None
    assert gpu.step_kernels("draw", [], [], [], []) is None
    with without_kernels():
        assert gpu.step_kernels("draw", [x], [x], [x], [x]) is None
    if DEVICE == "cuda":
        assert gpu.step_kernels("draw", [x], [x], [x], [x]) is kernels
        assert gpu.step_kernels("draw", [x], [x.cpu()], [x], [x]) is None


@pytest.mark.skipif(DEVICE == "cpu", reason="only a GPU's tensors are given to Triton")
def test_the_operator_on_a_gpu() -> None:
    for sizes in (SIZES, (1024,) * 200):
        mean, noise = (numbers(torch.float32, sizes=sizes) for _ in range(2))
        precision = numbers(torch.float32, positive=True, sizes=sizes)
        weights = [torch.zeros_like(m) for m in mean]
        draw_(weights, mean, precision, noise)
        for w, m, p, e in zip(weights, mean, precision, noise, strict=True):
            torch.testing.assert_close(w, m + e / p.sqrt())


COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from persample.kernels.triton import step

for architecture in (80, 90):
    for dtype in (triton.language.float32, triton.language.float64):
        kinds = {"has_momentum": True, "clips": True, "order_updated": True}
        for kernel, own in ((step.draw, {}), (step.update, kinds), (step.update, dict.fromkeys(kinds, False))):
            constants = own | {"dtype": dtype, "block": 1024}
            signature = {"table": "*i64", "tensors": "i32"} | dict.fromkeys(constants, "constexpr")
            source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
            found = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": 4})
            assert "cubin" in found.asm
print("all compiled")
"""


@pytest.mark.skipif(DEVICE == "cuda", reason="the kernels run there")
def test_the_kernels_compile_for_gpus_that_are_not_here(tmp_path: Path) -> None:
    from triton.backends import backends

    if "nvidia" not in backends:
        pytest.skip("this Triton has no compiler for GPUs of NVIDIA")
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    (script := tmp_path / "compile_all.py").write_text(COMPILED)
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(persample.__file__).parents[1]), *sys.path])
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False)
    assert "all compiled" in done.stdout, done.stderr[-2000:]
