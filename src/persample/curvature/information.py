"""The diagonal Fisher information as a value: merging, saving, loading."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from persample.errors import DataError, MissingPackageError, OptionError
from persample.files import replacing

Kind: TypeAlias = Literal["empirical", "mc", "exact"]

_FORMAT = "persample fisher"


@dataclass(frozen=True, eq=False)
class Fisher:
    """The diagonal of the Fisher information, averaged over samples.

    Attributes:
        diagonal: Σ_i F_i / N for each parameter, keyed by its name in `model.named_parameters()`, with its shape, in
            at least float32.
        data_size: N, the number of samples.
        kind: "empirical", "mc" or "exact", see `persample.fisher`.

    Raises:
        OptionError: `data_size` or `kind` is not allowed.
    """

    diagonal: Mapping[str, Tensor]
    data_size: int
    kind: Kind = "empirical"

    def __post_init__(self) -> None:
        if isinstance(self.data_size, bool) or not isinstance(self.data_size, int) or self.data_size < 1:
            raise OptionError(f"data_size={self.data_size!r} must be a whole number >= 1.")
        require_kind(self.kind)

    def merge(self, other: Fisher) -> Fisher:
        """Return the Fisher information over the samples of both, weighted by `data_size`.

        Raises:
            OptionError: they are of different kinds, or belong to different parameters.
        """
        if not isinstance(other, Fisher):
            raise OptionError(f"A Fisher information merges with another one, not with {type(other).__name__}.")
        if self.kind != other.kind:
            raise OptionError(
                f"A Fisher information of kind {self.kind!r} cannot merge with one of kind {other.kind!r}: compute "
                "both with the same kind."
            )
        ours, theirs = ({n: t.shape for n, t in f.diagonal.items()} for f in (self, other))
        if ours != theirs:
            first = next(n for n in [*ours, *theirs] if ours.get(n) != theirs.get(n))
            raise OptionError(f"The two Fisher informations belong to different models: they differ in {first!r}.")
        size = self.data_size + other.data_size
        weight = other.data_size / size
        merged = {name: torch.lerp(t, other.diagonal[name].to(t), weight) for name, t in self.diagonal.items()}
        return Fisher(merged, size, self.kind)

    def save(self, path: str | PathLike[str]) -> None:
        """Write it to a safetensors file, whole or not at all.

        Raises:
            MissingPackageError: the package safetensors is not installed.
            DataError: the file cannot be written.
        """
        header = {
            "format": _FORMAT,
            "version": "1",
            "kind": self.kind,
            "data_size": str(self.data_size),
            "parameters": json.dumps(list(self.diagonal)),
        }
        tensors = {name: t.detach().clone(memory_format=torch.contiguous_format) for name, t in self.diagonal.items()}
        content = _safetensors().torch.save(tensors, metadata=header)
        try:
            with replacing(Path(path)) as temporary:
                temporary.write_bytes(content)
        except (OSError, ValueError) as error:
            raise DataError(f"{path} cannot be written: {error}; choose a file in a writable folder.") from error

    @staticmethod
    def load(path: str | PathLike[str], *, device: torch.device | str = "cpu") -> Fisher:
        """Read what `save` wrote.

        Raises:
            MissingPackageError: the package safetensors is not installed.
            DataError: the file is missing, damaged, or holds something else.
        """
        safetensors = _safetensors()
        try:
            with safetensors.safe_open(Path(path), framework="pt") as file:
                header = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
        except (OSError, ValueError, safetensors.SafetensorError) as error:
            raise DataError(f"{path} cannot be read ({error}): pass a file that Fisher.save wrote.") from error
        if header.get("format") != _FORMAT:
            raise DataError(f"{path} holds tensors, but not a Fisher information: its header lacks {_FORMAT!r}.")
        try:
            names, size, kind = json.loads(header["parameters"]), int(header["data_size"]), header["kind"]
            diagonal = {name: tensors[name].to(device) for name in names}
            whole = diagonal.keys() == tensors.keys() and all(_is_diagonal(t) for t in tensors.values())
            found = Fisher(diagonal, size, kind)
        except (KeyError, ValueError, TypeError) as error:  # OptionError is a ValueError
            raise DataError(f"{path} is damaged: its header and its tensors do not belong together.") from error
        if not whole:
            raise DataError(f"{path} is damaged: its tensors are not those of a Fisher information.")
        return found


def require_kind(kind: object) -> None:
    """Raise unless `kind` is one of a Fisher information.

    Raises:
        OptionError: it is not.
    """
    if kind not in get_args(Kind):
        raise OptionError(f'kind={kind!r} must be "empirical", "mc" or "exact".')


def _is_diagonal(values: Tensor) -> bool:
    return values.is_floating_point() and bool((values.isfinite() & (values >= 0)).all())


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise MissingPackageError(
            f'Saving a Fisher information needs safetensors ({error}); run: pip install "persample[safetensors]"'
        ) from error
    return safetensors
