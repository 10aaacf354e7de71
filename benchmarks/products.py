"""Products of single samples with their squares on a GPU: all launches of the Triton kernels beside PyTorch's forms.

    python benchmarks/products.py --seconds 90 --out runs/products

For each layer of some models: milliseconds of the ordinary weight gradient, of the forms in PyTorch's operations that
`fused` chooses from, and of the Triton kernels by each launch worth trying, with the largest error of both sums against
float64 beside it (1e-5 is what must hold). Writes `products.json` as it goes, and stops when the time is over.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))
from persample.files import replacing
from persample.kernels import convolution_forms, linear
from persample.kernels.images import Geometry, Images
from persample.kernels.triton import launch as kernels
from persample.kernels.triton.tuning import Shape, launches, milliseconds

Sums = tuple[Tensor, Tensor]

# Convolutions as (batch, C, O, size, window, stride, padding), linear layers as (batch, positions, K, O).
LAYERS: dict[str, tuple[int, ...]] = {
    "ResNet-18 64": (512, 64, 64, 32, 3, 1, 1),
    "GPT-2 up": (16, 256, 768, 3072),
    "ResNet-18 512": (512, 512, 512, 4, 3, 1, 1),
    "ViT-S up": (128, 197, 384, 1536),
    "LeNet-5 first": (512, 3, 6, 32, 5, 1, 0),
    "LeNet-5 linear": (512, 1, 400, 120),
    "ResNet-18 128": (512, 128, 128, 16, 3, 1, 1),
    "ResNet-18 256": (512, 256, 256, 8, 3, 1, 1),
    "GPT-2 qkv": (16, 256, 768, 2304),
    "GPT-2 down": (16, 256, 3072, 768),
    "GPT-2 out": (16, 256, 768, 768),
    "ResNet-18 first": (512, 3, 64, 32, 3, 1, 1),
    "ResNet-18 256-512": (512, 256, 512, 8, 3, 2, 1),
    "ResNet-18 64-128": (512, 64, 128, 32, 3, 2, 1),
    "ResNet-18 128-256": (512, 128, 256, 16, 3, 2, 1),
    "ResNet-18 shortcut": (512, 64, 128, 32, 1, 2, 0),
    "ViT-S qkv": (128, 197, 384, 1152),
    "ViT-S down": (128, 197, 1536, 384),
    "ViT-S out": (128, 197, 384, 384),
    "ViT-S patches": (128, 3, 384, 224, 16, 16, 0),
    "LeNet-5 second": (512, 6, 16, 14, 5, 1, 0),
    "MLP": (512, 1, 784, 400),
    "ViT-S head": (128, 1, 384, 1000),
}
SMALL = {"convolution": (3, 8, 6, 6, 3, 1, 1), "positions": (3, 20, 18, 17), "one position": (20, 1, 18, 17)}


def measure(sizes: tuple[int, ...], device: str) -> dict[str, Any]:
    """Return the times of one layer, and the errors."""
    (x, delta), plain, forms, by_triton, candidates = (a_linear if len(sizes) == 4 else a_convolution)(sizes, device)
    truth = by_float64(forms, x, delta)
    found: dict[str, Any] = {"ordinary": timed(plain, device), "forms": {}, "launches": []}
    for name, form in forms.items():
        found["forms"][name] = timed(lambda form=form: form(x, delta), device)  # type: ignore[misc]
    for launch in candidates:
        entry: dict[str, Any] = asdict(launch)
        try:
            entry["error"] = error(by_triton(launch), truth)
            entry["milliseconds"] = timed(lambda launch=launch: by_triton(launch), device)  # type: ignore[misc]
        except Exception as problem:  # noqa: BLE001  what cannot run is a finding
            entry["problem"] = f"{type(problem).__name__}: {str(problem)[:200]}"
        found["launches"].append(entry)
    return found


def a_linear(sizes: tuple[int, ...], device: str) -> tuple[Any, ...]:
    """A linear layer: operands, ordinary weight gradient, forms, the kernel, its launches."""
    batch, positions, inputs, outputs = sizes
    x, delta = (
        like_activations(batch, positions, inputs, device=device),
        like_gradients(batch, positions, outputs, x=device),
    )

    def plain() -> Tensor:
        return delta.flatten(0, 1).mT @ x.flatten(0, 1)

    if positions == 1:
        forms = {
            name: lambda x, d, form=form: form(d.squeeze(1), x.squeeze(1))
            for name, form in linear.one_position(x.squeeze(1)).items()
        }
    else:
        forms = {
            name: lambda x, d, form=form: form(d, x)
            for name, form in linear.many_positions(delta, x).items()
            if "one by one" not in name or batch <= 16
        }
    forms.pop("triton", None)
    return (
        *((x, delta), plain, forms, lambda launch: kernels.linear_moments(x, delta, launch=launch)),
        launches(Shape((), batch, outputs, inputs, batch if positions == 1 else positions)),
    )


def a_convolution(sizes: tuple[int, ...], device: str) -> tuple[Any, ...]:
    """A convolution: the same."""
    batch, channels, outputs, size, window, stride, padding = sizes
    length = (size + 2 * padding - window) // stride + 1
    x = like_activations(batch, channels, size, size, device=device)
    delta = like_gradients(batch, outputs, length, length, x=device)
    geometry = Geometry((outputs, channels, window, window), (stride,) * 2, (padding,) * 2, (1, 1), 1)
    arguments = (geometry.weight[2:], geometry.stride, geometry.padding, geometry.dilation, 1)

    def plain() -> Tensor:
        options = (None, *arguments[1:4], False, [0, 0], 1, [False, True, False])
        gradient: Tensor = torch.ops.aten.convolution_backward.default(
            delta, x, x.new_empty(geometry.weight), *options
        )[1]
        return gradient

    found = convolution_forms.forms(Images(delta, x, geometry))
    forms = {
        name: lambda x, d, form=form: form.moments(Images(d, x, geometry))
        for name, form in found.items()
        if name not in ("single", "triton")
    }
    return (
        *((x, delta), plain, forms, lambda launch: kernels.convolution_moments(x, delta, *arguments, launch=launch)),
        launches(Shape((), batch, outputs, channels * window**2, length**2), channels=channels),
    )


def like_activations(*shape: int, device: str) -> Tensor:
    """Numbers none of which is below zero, as after a ReLU, so that sums grow along the positions."""
    return torch.randn(*shape, device=device).relu_()


def like_gradients(*shape: int, x: str) -> Tensor:
    """Numbers with a mean, for the same reason."""
    return torch.randn(*shape, device=x).add_(0.3)


def by_float64(forms: Mapping[str, Callable[..., Sums]], x: Tensor, delta: Tensor) -> Sums:
    """Return both sums in float64, by a form of PyTorch's, some samples at a time."""
    form = next(form for name, form in forms.items() if name.startswith(("blas", "batched", "patches")))
    rows = max(1, len(x) // 8)
    parts = [form(a.double(), d.double()) for a, d in zip(x.split(rows), delta.split(rows), strict=True)]
    return sum(p[0] for p in parts), sum(p[1] for p in parts)  # type: ignore[return-value]


def error(sums: Sums, truth: Sums) -> float:
    """Return the largest difference, over the largest entry."""
    return max(float((s - t).abs().max() / t.abs().max()) for s, t in zip(sums, truth, strict=True))


def timed(run: Callable[[], Any], device: str) -> float:
    """Return the milliseconds of a call; what is slow runs but twice."""
    for _ in range(2):
        start = time.perf_counter()
        run()
        if device != "cpu":
            torch.cuda.synchronize()
        took = 1000 * (time.perf_counter() - start)
    return round(milliseconds(run) if device != "cpu" and took < 50 else took, 4)


def told(name: str, sizes: tuple[int, ...], found: dict[str, Any]) -> str:
    """Return the figures of a layer as lines."""
    ran = sorted((e for e in found["launches"] if "milliseconds" in e), key=lambda e: e["milliseconds"])
    plain = found["ordinary"]
    work = 2 * math.prod(sizes) * 1e-9 if len(sizes) == 4 else None
    forms = ", ".join(f"{form} {took:.3f}" for form, took in found["forms"].items())
    lines = [f"{name} {sizes}: ordinary {plain:.3f} ms{f' ({work / plain:.1f} TFLOP/s)' if work else ''}; {forms}"]
    for e in [*ran[:4], *[e for e in ran[4:] if e["precision"] != ran[0]["precision"]][:1]]:
        kind = (
            f"{e['precision']} {e['block_o']}×{e['block_k']}×{e['block_l']}, {e['warps']} warps, {e['stages']} stages"
        )
        last = "" if e["channels_last"] else ", channels first"
        took = f"{e['milliseconds']:.3f} ms, {e['milliseconds'] / plain:.2f} of it"
        lines.append(f"    {took}: {kind}{last}; error {e['error']:.1e}")
    lines.append(f"    largest error {max((e['error'] for e in ran), default=math.nan):.1e}")
    lines += sorted({f"    {e['problem']}" for e in found["launches"] if "problem" in e})
    return "\n".join(lines)


def main() -> None:
    """Read the arguments, and measure layer by layer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=90, help="how long it may take")
    parser.add_argument("--out", type=Path, default=Path("runs/products"), help="folder for the figures")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu for a rehearsal by Triton's interpreter")
    parser.add_argument("--layers", default="", help="only those whose names begin so")
    arguments = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    end = time.monotonic() + arguments.seconds
    arguments.out.mkdir(parents=True, exist_ok=True)
    report = {}
    for name, sizes in (SMALL if arguments.device == "cpu" else LAYERS).items():
        if not name.startswith(arguments.layers):
            continue
        if time.monotonic() > end:
            print(f"no time was left from {name} on", flush=True)
            break
        torch.manual_seed(0)
        report[name] = measure(sizes, arguments.device)
        print(told(name, sizes, report[name]), flush=True)
        with replacing(arguments.out / "products.json") as new:
            new.write_text(json.dumps(report, indent=1) + "\n")
        if arguments.device != "cpu":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
