from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from persample.errors import OptionError
from persample.experiments.figures import figure2
from persample.experiments.metrics import Metrics
from persample.experiments.records import Record, Split

COLOURS = {"point": (0xD5, 0x5E, 0x00), "averaged": (0x00, 0x72, 0xB2), "mean": (0x56, 0xB4, 0xE9)}


def records(epochs: int, held_out: Split = "test") -> list[Record]:
    return [
        Record(optimizer, epoch, split, prediction, Metrics(0.9 - height / epoch, 0.1 + height / epoch, 0.0))
        for optimizer, prediction, height in [
            ("adam", "point", 0.1),
            ("vogn", "mean", 0.3),
            ("vogn", "averaged", 0.5),
        ]
        for split in ("train", held_out)
        for epoch in range(1, epochs + 1)
    ]


def coloured(picture: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """Return (height, width): where the picture has the colour."""
    return (np.abs(picture[..., :3] * 255 - colour) < 2).all(axis=-1)


@pytest.mark.parametrize(("epochs", "held_out"), [(1, "test"), (20, "test"), (2, "validation")])
def test_every_panel_shows_every_curve(tmp_path: Path, epochs: int, held_out: Split) -> None:
    path = tmp_path / "figure2.png"

    figure2(records(epochs, held_out), path, "A title")

    picture = matplotlib.image.imread(path)
    height, width = picture.shape[:2]
    panels = [
        (slice(None, height // 2), slice(None, width // 2)),
        (slice(None, height // 2), slice(width // 2, None)),
        (slice(height // 2, int(height * 0.92)), slice(None, width // 2)),
        (slice(height // 2, int(height * 0.92)), slice(width // 2, None)),
    ]
    for panel in panels:
        for colour in COLOURS.values():
            assert coloured(picture[panel], colour).sum() > 10
    assert list(tmp_path.iterdir()) == [path]


def test_one_optimizer_alone_is_drawn(tmp_path: Path) -> None:
    figure2([r for r in records(3) if r.optimizer == "adam"], tmp_path / "adam.png", "Adam")

    picture = matplotlib.image.imread(tmp_path / "adam.png")
    assert coloured(picture, COLOURS["point"]).any()
    assert not coloured(picture, COLOURS["averaged"]).any()


def test_the_suffix_chooses_the_format(tmp_path: Path) -> None:
    figure2(records(2), tmp_path / "figure2.svg", "The headline")

    assert (tmp_path / "figure2.svg").read_text().startswith("<?xml")


def test_refuses_to_draw_nothing(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="records is empty; train for at least one epoch"):
        figure2([], tmp_path / "figure2.png", "Nothing")

    assert list(tmp_path.iterdir()) == []


def test_leaves_the_global_state_of_pyplot_alone(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from persample.experiments.figures import figure2; "
        "from persample.experiments.records import Record; from persample.experiments.metrics import Metrics; "
        f"figure2([Record('adam', 1, 'test', 'point', Metrics(1, 0, 0))], Path({str(tmp_path)!r}) / 'a.png', ''); "
        "assert 'matplotlib.pyplot' not in sys.modules"
    )

    subprocess.run([sys.executable, "-c", code], check=True)
