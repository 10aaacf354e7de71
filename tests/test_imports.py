"""The imports of the package: no circle, and none from a lower layer to a higher one."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import persample

SRC = Path(persample.__file__).parent.parent

#: From the lowest layer to the highest. The rooms of a layer may import each other's modules, as long as there is no
#: circle of modules; the longest name that fits a module says which room it is in.
LAYERS = (
    ("persample.errors", "persample.warn", "persample.dtypes", "persample.files"),
    (
        "persample.losses",
        "persample.moments",
        "persample.frozen_batch_norm",
        "persample.quantities",
        "persample.metrics",
    ),
    ("persample.sources.model", "persample.sources.splits", "persample.sources.batch", "persample.sources.lock"),
    ("persample.kernels",),
    ("persample.sources.contract",),
    ("persample.sources.selfcheck",),
    ("persample.sources.recording",),
    ("persample.sources.source",),
    ("persample.sources.backends",),
    ("persample.sources.registry",),
    ("persample.sources",),
    ("persample.loaders",),
    ("persample.vogn", "persample.checks"),
    ("persample.likelihoods",),
    ("persample.curvature", "persample.plots"),
    ("persample",),
    ("persample.experiments", "persample.testing", "persample.integrations"),
    ("persample.cli", "persample.__main__"),
)
RANK = {room: rank for rank, rooms in enumerate(LAYERS) for room in rooms}


def module_name(path: Path) -> str:
    parts = path.relative_to(SRC).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in (SRC / "persample").rglob("*.py")}


def imports_of(module: str) -> set[str]:
    """The modules of the package that a module imports, anywhere in its file; those for annotations count."""
    found = set()
    for node in ast.walk(ast.parse(FILES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None and node.level == 0:
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in FILES else node.module for name in inside}
    return (found & FILES.keys()) - {module}


def rank_of(module: str) -> int:
    parts = module.split(".")
    names = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    return next(RANK[name] for name in names if name in RANK)


def test_there_is_no_circle() -> None:
    try:
        tuple(TopologicalSorter({module: imports_of(module) for module in FILES}).static_order())
    except CycleError as error:
        pytest.fail(f"These modules import each other: {' -> '.join(reversed(error.args[1]))}")


def test_lower_layers_know_nothing_of_higher_ones() -> None:
    against = [
        f"{module} imports {other}"
        for module in FILES
        for other in imports_of(module)
        if rank_of(other) > rank_of(module)
    ]
    assert not against, "\n".join(sorted(against))


def test_the_map_names_every_room() -> None:
    """Each package stands in the architecture page by its folder; those inside of rooms by their own names."""
    page = (Path(__file__).parents[1] / "docs" / "architecture.md").read_text(encoding="utf-8")
    rooms = {path.parent.name for path in (SRC / "persample").rglob("__init__.py")} - {"persample"}
    inside = {"australian_credit", "contest", "data", "module_sweep"}  # of experiments and testing
    assert [room for room in sorted(rooms - inside) if f"{room}/" not in page] == []
