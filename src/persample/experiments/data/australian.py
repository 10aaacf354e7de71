"""Australian credit approval (Statlog), scaled and split as in the published experiment of VOGN and Vadam."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from persample.experiments.data.folders import read_verified
from persample.experiments.data.load import locate
from persample.experiments.data.published import PublishedFile, PublishedFiles

FEATURES = 14
_ROWS = 345

AUSTRALIAN = PublishedFiles(
    title="Australian credit",
    folder="australian",
    files=(
        PublishedFile(
            "australian_scale_X_tr.csv",
            123_873,
            "sha256:d63ea54a248e27d7f09353d23aef75a9ccf1f94a477e3a1847a2ffcaffb42bd6",
        ),
        PublishedFile(
            "australian_scale_y_tr.csv",
            8_625,
            "sha256:161e7784bf00bc6cbe42c37268097ea3e13889860dd2b44f10b976799577da7b",
        ),
        PublishedFile(
            "australian_scale_X_te.csv",
            123_941,
            "sha256:a4c45c6ccf5205b85244f8a3039085c276bc58ba1cb60e7423e276eba1eccb05",
        ),
        PublishedFile(
            "australian_scale_y_te.csv",
            8_625,
            "sha256:6fb798e2e6c64e806b853e082d1388258cff398e313cb0400a43e2b025334cfc",
        ),
    ),
    url=(
        "https://raw.githubusercontent.com/emtiyaz/vadam/cec5c814f077857e20bfd42efb5c51de05fad391"
        "/pytorch/vadam/data/australian_presplit/"
    ),
)


@dataclass(frozen=True)
class TableDataset:
    """A data set of rows with two classes, as tensors on the CPU.

    Attributes:
        train_inputs: Float32 features (N, F).
        train_targets: Float32 zeros and ones (N,).
        test_inputs: As `train_inputs`.
        test_targets: As `train_targets`.
    """

    train_inputs: Tensor
    train_targets: Tensor
    test_inputs: Tensor
    test_targets: Tensor


def load_australian(data_dir: str | os.PathLike[str] | None = None) -> TableDataset:
    """Load the published split: 345 rows to train on and 345 to test, 14 features scaled to [-1, 1].

    The files are looked for and downloaded as those of `load_dataset`, in the subfolder `australian/`.

    Args:
        data_dir: The folder to look in first.

    Raises:
        DataError: A folder does not exist, a file is damaged or missing, or the download failed.
        MissingPackageError: A package of the extra `experiments` is not installed.
    """
    contents = read_verified(AUSTRALIAN, locate(AUSTRALIAN, data_dir))
    train_inputs, train_targets, test_inputs, test_targets = (contents[file.name] for file in AUSTRALIAN.files)
    return TableDataset(
        train_inputs=_floats(train_inputs, (_ROWS, FEATURES)),
        train_targets=_floats(train_targets, (_ROWS,)),
        test_inputs=_floats(test_inputs, (_ROWS, FEATURES)),
        test_targets=_floats(test_targets, (_ROWS,)),
    )


def _floats(content: bytes, shape: tuple[int, ...]) -> Tensor:
    values: NDArray[np.float32] = np.loadtxt(io.BytesIO(content), dtype=np.float32)
    return torch.from_numpy(values.reshape(shape))
