"""A posterior as a safetensors file: tensors and a text header, nothing executable."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from persample.errors import DataError, MissingPackageError, OptionError
from persample.files import replacing
from persample.vogn.saving.likelihood import packed, unpacked

_FORMAT = "persample posterior"
_VERSION = "1"


def write(
    path: Path,
    mean: Mapping[str, Tensor],
    precision: Mapping[str, Tensor],
    loss_fn: Callable[[Any, Any], Any] | None,
) -> None:
    """Write mean, precision and likelihood, whole or not at all.

    The header has the format, its version, the likelihood, and the names of the parameters in their order, which
    safetensors does not keep, and on which the noise of a draw depends.

    Raises:
        MissingPackageError: safetensors is not installed.
        DataError: the file cannot be written.
    """
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise MissingPackageError(_missing(error)) from error
    tensors = {f"mean/{name}": _plain(value) for name, value in mean.items()}
    tensors |= {f"precision/{name}": _plain(value) for name, value in precision.items()}
    header = {
        "format": _FORMAT,
        "version": _VERSION,
        "parameters": json.dumps(list(mean)),
        "likelihood": packed(loss_fn),
    }
    try:
        with replacing(path) as temporary:
            temporary.write_bytes(save(tensors, metadata=header))
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path} cannot be written: {reason}; choose a file in a writable folder.") from error


def read(
    path: Path, device: torch.device | str
) -> tuple[dict[str, Tensor], dict[str, Tensor], Callable[[Any, Any], Any] | None]:
    """Return the mean and the precision that `write` wrote, on `device`, and a loss of its likelihood.

    Raises:
        MissingPackageError: safetensors is not installed.
        OptionError: there is no such device here.
        DataError: the file is missing, damaged, or not a posterior.
    """
    _require_device(device)
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise MissingPackageError(_missing(error)) from error
    if path.exists() and not path.is_file():
        raise DataError(
            f"{path} cannot be read: it is a folder, a pipe or a device; pass a file that Posterior.save wrote."
        )
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            names = _names(path, header, set(file.keys()))
            mean = {name: file.get_tensor(f"mean/{name}") for name in names}
            precision = {name: file.get_tensor(f"precision/{name}") for name in names}
    except (FileNotFoundError, ValueError) as error:
        raise DataError(f"{path} does not exist: save a posterior there first, or correct the path.") from error
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path} cannot be read ({error}): it is damaged, or not a safetensors file.") from error
    for name in names:
        _require_values(path, name, mean[name], precision[name])
    return (
        {name: value.to(device) for name, value in mean.items()},
        {name: value.to(device) for name, value in precision.items()},
        _loss_of(path, header),
    )


def _loss_of(path: Path, header: Mapping[str, str]) -> Callable[[Any, Any], Any] | None:
    try:
        return unpacked(header.get("likelihood", "null"))  # earlier versions wrote none
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise DataError(f"{path} is a damaged posterior: its header names no likelihood ({error}).") from error


def _require_device(device: torch.device | str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:  # AssertionError: a build of PyTorch without CUDA
        reason = str(error).splitlines()[0]
        raise OptionError(f'device={device!r}: there is no such device here ({reason}); load on "cpu".') from error


def _names(path: Path, header: Mapping[str, str], keys: set[str]) -> list[str]:
    """The names of the parameters, in order."""
    if header.get("format") != _FORMAT:
        raise DataError(f"{path} holds tensors, but not a posterior: its header lacks format={_FORMAT!r}.")
    if header.get("version") != _VERSION:
        raise DataError(
            f"{path} is a posterior in version {header.get('version')!r} of the format, and this version of persample "
            f"reads {_VERSION!r}: update persample, or save the posterior anew."
        )
    try:
        names = json.loads(header.get("parameters", ""))
    except json.JSONDecodeError:
        names = None
    if not isinstance(names, list) or keys != {f"{part}/{name}" for name in names for part in ("mean", "precision")}:
        raise DataError(f"{path} is a damaged posterior: its header and its tensors do not belong together.")
    return names


def _require_values(path: Path, name: str, mean: Tensor, precision: Tensor) -> None:
    """Check for real numbers of matching shapes, finite means and positive precisions."""
    if not mean.is_floating_point() or mean.dtype != precision.dtype or mean.shape != precision.shape:
        raise DataError(f"{path} is a damaged posterior: mean and precision of {name!r} have other types or shapes.")
    if not bool((mean.isfinite() & (precision > 0)).all()):
        raise DataError(f"{path} is a damaged posterior: {name!r} has a mean that is not finite, or a precision <= 0.")


def _plain(tensor: Tensor) -> Tensor:
    """A copy that shares no memory with others, as the format requires."""
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def _missing(error: ImportError) -> str:
    return f'Saving and loading a posterior needs safetensors ({error}); run: pip install "persample[safetensors]"'
