"""How a kernel is launched: found by trial for each shape, then remembered in a file of the user's cache folder."""

from __future__ import annotations

import json
import logging
import math
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
import triton
from triton.errors import TritonError

from persample.files import replacing

Result = TypeVar("Result")

_log = logging.getLogger(__name__)

_TRIALS = 5
# Outputs, columns, warps and precision. Those of an H100, of all that fit its registers, the fastest first.
WIDE = (
    *((32, 128, 4, "tf32x3"), (64, 64, 4, "ieee"), (32, 128, 4, "ieee"), (128, 64, 8, "tf32x3")),
    (64, 128, 8, "ieee"),
)
FEW_COLUMNS = ((32, 64, 2, "tf32x3"), (64, 32, 4, "tf32x3"), (64, 64, 4, "ieee"))
FEW_OUTPUTS = ((16, 64, 4, "tf32x3"), (16, 128, 4, "tf32x3"))
_FEW_CHANNELS = 16
_MOST_PARTIAL_NUMBERS = 2**24  # of each of the two sums, 64 MiB in float32


@dataclass(frozen=True)
class Launch:
    """How a kernel is launched.

    Attributes:
        block_o: outputs of a tile,
        block_k: its columns,
        block_l: and the positions that are multiplied at a time.
        warps: of a program.
        precision: how float32 is multiplied: `"ieee"` by the processors of all arithmetic, `"tf32x3"` as three products
            of tensor cores, which is as exact, `"tf32"` as one.
        stages: how many blocks are on their way from memory.
        channels_last: whether a convolution's input is copied so that the channels of a pixel lie side by side.
    """

    block_o: int
    block_k: int
    block_l: int
    warps: int = 4
    precision: str = "tf32x3"
    stages: int = 3
    channels_last: bool = True

    @property
    def programs(self) -> int:
        """How many programs run on a multiprocessor, about."""
        return max(1, 8 // self.warps)

    def options(self) -> dict[str, Any]:
        """Return the arguments of a kernel's launch that every kernel takes."""
        blocks = {"block_o": self.block_o, "block_k": self.block_k, "block_l": self.block_l}
        return blocks | {"precision": self.precision, "num_warps": self.warps, "num_stages": self.stages}


@dataclass(frozen=True)
class Shape:
    """What decides how a kernel is launched.

    Attributes:
        kind: the kernel, and what else matters: dtype, precision, the geometry of a convolution.
        samples: B.
        outputs: O, of a group.
        columns: K, of a group.
        positions: L, of an image.
        groups: G.
    """

    kind: tuple[Any, ...]
    samples: int
    outputs: int
    columns: int
    positions: int
    groups: int = 1


def launches(shape: Shape, tf32: bool = False, channels: int | None = None) -> list[Launch]:
    """Return the launches worth trying, the likely one first.

    Args:
        shape: what is launched for.
        tf32: whether a single product of TF32 is exact enough.
        channels: those of a convolution's group.
    """
    length = min(32, _power_of_two(shape.positions))
    tiles = FEW_OUTPUTS if shape.outputs <= 16 else FEW_COLUMNS if shape.columns <= 64 else WIDE
    orders = (False, True) if channels is not None and channels < _FEW_CHANNELS else (True,)
    found = [
        Launch(o, k, length, warps, "tf32" if tf32 else precision, channels_last=last)
        for o, k, warps, precision in tiles
        for last in orders
    ]
    return list(dict.fromkeys(found))


def parts_of(shape: Shape, launch: Launch, processors: int) -> int:
    """Return among how many programs, that each take some of the samples, a tile is divided.

    So many that the last round of programs is nearly full; the fewest of those that are about as good.
    """
    tiles = shape.groups * math.ceil(shape.outputs / launch.block_o) * math.ceil(shape.columns / launch.block_k)
    at_once = launch.programs * processors
    most = min(shape.samples, max(1, _MOST_PARTIAL_NUMBERS // (shape.groups * shape.outputs * shape.columns)))
    most = min(most, max(1, 4 * at_once // tiles))

    def rounds(parts: int) -> int:
        return math.ceil(tiles * parts / at_once) * math.ceil(shape.samples / parts)

    best = min(map(rounds, range(1, most + 1)))
    parts = next(parts for parts in range(1, most + 1) if rounds(parts) <= 1.03 * best)
    return math.ceil(shape.samples / math.ceil(shape.samples / parts))  # the last is not left without samples


def _power_of_two(number: int) -> int:
    """The next power of two, at least 16."""
    return max(16, 1 << (number - 1).bit_length())


# Trials.

_found: dict[tuple[str, Shape], Launch] = {}


def launch_for(
    shape: Shape, candidates: Sequence[Launch], device: torch.device, run: Callable[[Launch], Any], fixed: bool
) -> Launch:
    """Return the fastest of the candidates for this shape: from memory, from the file, or by trying all.

    Args:
        shape: what decides.
        candidates: the likely one first.
        device: where the kernel runs.
        run: launches the kernel.
        fixed: whether nothing may be tried, because results must repeat from run to run.
    """
    if fixed or device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return candidates[0]
    machine = _machine(device)
    # Sequences and images come in ever new lengths: those between the same powers of two share a trial.
    shape = replace(shape, samples=_power_of_two(shape.samples), positions=_power_of_two(shape.positions))
    launch = _found.get((machine, shape))
    if launch is None:
        launch = remembered(machine, shape, candidates)
        if launch is None:
            launch = _fastest(candidates, run)
            remember(machine, shape, launch)
        _found[machine, shape] = launch
    return launch


def _fastest(candidates: Sequence[Launch], run: Callable[[Launch], Any]) -> Launch:
    """Time all candidates that run, and return the fastest."""
    times = {}
    for launch in candidates:
        try:
            times[launch] = milliseconds(lambda launch=launch: run(launch))  # type: ignore[misc]
        except TritonError:  # it does not fit
            continue
    if not times:
        raise RuntimeError("no way to launch the kernel fits this GPU")
    likely, best = next(iter(times)), min(times, key=times.__getitem__)
    return likely if times[likely] <= 1.03 * times[best] else best


def milliseconds(run: Callable[[], Any], trials: int = _TRIALS) -> float:
    """Return how long `run` takes on the GPU, the median of some trials after a first."""
    run()
    times: list[float] = []
    for _ in range(trials):
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        run()
        last.record()
        last.synchronize()
        times.append(first.elapsed_time(last))
    return statistics.median(times)


# The file.


def _machine(device: torch.device) -> str:
    return f"{torch.cuda.get_device_name(device)}, PyTorch {torch.__version__}, Triton {triton.__version__}"


def file_of(machine: str) -> Path:
    """Return where launches for a machine are remembered."""
    folder = os.environ.get("PERSAMPLE_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "persample"
    name = "".join(letter if letter.isalnum() or letter in ".-" else "-" for letter in machine)
    return Path(folder).expanduser() / f"{name}.json"


@cache
def _read(path: Path) -> dict[str, dict[str, Any]]:
    """What the file holds; nothing if there is none, or it is damaged, which is said."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError(f"it holds a {type(found).__name__}, not an object")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RuntimeError) as error:
        _log.warning("How Triton kernels are launched is tried anew, as %s cannot be read: %s.", path, error)
        return {}
    return {name: entry for name, entry in found.items() if isinstance(entry, dict)}


def remembered(machine: str, shape: Shape, candidates: Sequence[Launch]) -> Launch | None:
    """Return the launch that the file has for this shape, if it is among the candidates."""
    entry = _read(file_of(machine)).get(_name(shape))
    return next((launch for launch in candidates if asdict(launch) == entry), None)


def remember(machine: str, shape: Shape, launch: Launch) -> None:
    """Write the launch for this shape to the file; without one all goes on as before."""
    try:
        path = file_of(machine)
        path.parent.mkdir(parents=True, exist_ok=True)
        _read.cache_clear()
        held: Mapping[str, Any] = _read(path) | {_name(shape): asdict(launch)}
        with replacing(path) as new:
            new.write_text(json.dumps(held, indent=1) + "\n", encoding="utf-8")
    except (OSError, RuntimeError):
        return
    finally:
        _read.cache_clear()


def _name(shape: Shape) -> str:
    return repr(asdict(shape))
