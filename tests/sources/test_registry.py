"""Backends by name: which exist, which can be used, how third parties add theirs, what is told of a missing one."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import persample
from persample.errors import MissingPackageError, OptionError, PersampleError, UnknownBackendError
from persample.sources import registry
from persample.sources.backends.loop import LoopSource


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is forgotten at its end."""
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))


@pytest.fixture
def importable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder from which modules can be imported."""
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def make(backend: str) -> persample.PerSampleGradSource:
    return persample.make_source(backend, nn.Linear(3, 2), persample.losses.cross_entropy)


def test_the_backends_that_exist() -> None:
    found = persample.backends()
    assert {"loop", "hooks", "backpack", "opacus", "vmap"} <= found.keys()
    for name in ("loop", "hooks", "vmap"):
        assert found[name].available
        assert found[name].problem is None
        assert type(make(name)).__mro__[1] is persample.PerSampleGradSource


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    with pytest.raises(UnknownBackendError, match=r"no backend 'hook'.*'loop'.*'hooks'.*'vmap'") as raised:
        make("hook")
    assert isinstance(raised.value, PersampleError)
    assert isinstance(raised.value, ValueError)


def test_a_registered_backend_is_found_and_imported_when_it_is_chosen(importable: Path) -> None:
    (importable / "third_party.py").write_text("from persample.sources.backends.loop import LoopSource as Own")
    persample.register_backend("own", "third_party:Own")
    assert "third_party" not in sys.modules
    assert type(make("own")) is LoopSource
    assert persample.backends()["own"].available
    del sys.modules["third_party"]


def test_registering_the_same_again_is_no_error() -> None:
    persample.register_backend("own", "third_party:Own")
    persample.register_backend("own", "third_party:Own")


@pytest.mark.parametrize("name", ["loop", "own"])
def test_a_taken_name_is_refused(name: str) -> None:
    persample.register_backend("own", "third_party:Own")
    with pytest.raises(OptionError, match=f"'{name}' exists already"):
        persample.register_backend(name, "somewhere:Else")


@pytest.mark.parametrize("location", ["third_party", "third_party.Own", "a:b:c", ":Own", "third_party:"])
def test_a_location_that_is_none_is_refused(location: str) -> None:
    with pytest.raises(OptionError, match="module:class"):
        persample.register_backend("own", location)


def test_an_entry_point_is_found_by_itself(importable: Path) -> None:
    """A package that was installed, as importlib.metadata sees it."""
    (importable / "plugged_in.py").write_text("from persample.sources.backends.loop import LoopSource as Plugged")
    plug_in(importable, "plugged = plugged_in:Plugged")
    assert type(make("plugged")) is LoopSource
    assert persample.backends()["plugged"].available
    with pytest.raises(OptionError, match="exists already"):
        persample.register_backend("plugged", "somewhere:Else")
    del sys.modules["plugged_in"]


def test_a_backend_whose_module_is_missing_is_listed_and_says_what_to_install() -> None:
    persample.register_backend("own", "no_such_module:Own", install="pip install own-backend")
    found = persample.backends()["own"]
    assert not found.available
    assert "no_such_module" in str(found.problem)
    with pytest.raises(MissingPackageError, match=r"'own'.*no_such_module.*pip install own-backend") as raised:
        make("own")
    assert isinstance(raised.value, ImportError)


# Missing packages, in a process of their own, in which they cannot be imported.

_WITHOUT = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocked())
"""


def run_without(packages: set[str], code: str) -> str:
    program = _WITHOUT.format(blocked=packages) + code
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.parametrize("package", ["backpack", "opacus"])
def test_a_missing_package_is_told_with_what_to_install(package: str) -> None:
    code = f"""
import torch, persample
found = persample.backends()[{package!r}]
print(found.available, found.problem)
try:
    persample.make_source({package!r}, torch.nn.Linear(3, 2), persample.losses.cross_entropy)
except persample.PersampleError as error:
    print(type(error).__name__, error)
"""
    listed, refused = run_without({package}, code).splitlines()
    assert listed.startswith(f"False No module named '{package}")
    assert refused.startswith("MissingPackageError")
    assert f"'{package}'" in refused
    assert f'pip install "persample[{package}]"' in refused


def test_the_core_needs_no_extra() -> None:
    code = """
import torch, persample
moments = persample.make_source("hooks", torch.nn.Linear(3, 2), persample.losses.cross_entropy).moments(
    torch.ones(4, 3), torch.tensor([0, 1, 0, 1])
)
optimizer = persample.VOGN(torch.nn.Linear(3, 2), persample.losses.cross_entropy, data_size=4, lr=0.1, hess_init=1.0)
optimizer.observe(torch.ones(4, 3), torch.tensor([0, 1, 0, 1]))
optimizer.step()
print(moments.batch_size)
"""
    extras = {
        "backpack",
        "opacus",
        "torchvision",
        "functorch",
        "matplotlib",
        "rich",
        "pooch",
        "mlxtend",
        "torchmetrics",
    }
    assert run_without(extras, code).strip() == "4"


def test_importing_the_package_imports_no_backends_package() -> None:
    code = """
import sys, persample
print(sorted({"backpack", "opacus", "matplotlib", "torchmetrics", "torchvision"} & sys.modules.keys()))
"""
    assert run_without(set(), code).strip() == "[]"


def test_sources_are_made_without_touching_the_model() -> None:
    model = nn.Linear(3, 2)
    before = {name: p.clone() for name, p in model.named_parameters()}
    for name, backend in persample.backends().items():
        if backend.available:
            persample.make_source(name, model, persample.losses.cross_entropy)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not model._forward_hooks


# Broken backends of third parties: the others are served all the same.

BROKEN = {
    "import error": ("import no_such_module", MissingPackageError, r"No module named 'no_such_module'"),
    "runtime error": ("raise RuntimeError('two\\nlines')", MissingPackageError, r"RuntimeError: two lines"),
    "syntax error": ("class X(", MissingPackageError, r"SyntaxError: "),
    "exit": ("import sys; sys.exit(3)", MissingPackageError, r"SystemExit: 3"),
    "recursion": ("def f(): f()\nf()", MissingPackageError, r"RecursionError: "),
    "lazy": (
        "def __getattr__(name):\n    if name == 'X': raise OSError('no file')\n    raise AttributeError",
        MissingPackageError,
        r"OSError: no file",
    ),
    "no class": ("", OptionError, r"'broken_module:X' is not a subclass of persample\.PerSampleGradSource"),
    "an instance": ("X = 3", OptionError, r"is not a subclass"),
    "another class": ("class X:\n    pass", OptionError, r"is not a subclass"),
    "abstract": (
        "import persample\nclass X(persample.PerSampleGradSource):\n    pass",
        OptionError,
        r"'broken_module:X' does not implement compute_per_sample",
    ),
    "without check": (
        "from persample.sources.backends.loop import LoopSource\n"
        "class X(LoopSource):\n    def __init__(self, model, loss_fn):\n        super().__init__(model, loss_fn)",
        OptionError,
        r"'broken_module:X' takes neither the keyword argument 'check'",
    ),
}


@pytest.fixture
def broken(importable: Path, request: pytest.FixtureRequest) -> Iterator[str]:
    """An installed package whose entry point `broken` is broken; yields the kind."""
    (importable / "broken_module.py").write_text(BROKEN[request.param][0])
    plug_in(importable, "broken = broken_module:X")
    yield request.param
    sys.modules.pop("broken_module", None)


def plug_in(folder: Path, entry_point: str, name: str = "plugged-in") -> Path:
    package = folder / f"{name.replace('-', '_')}-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text(f"[persample.backends]\n{entry_point}\n")
    return package


@pytest.mark.parametrize("broken", BROKEN, indirect=True)
def test_a_broken_backend_is_listed_with_the_reason_and_refused(broken: str) -> None:
    _, kind, reason = BROKEN[broken]
    found = persample.backends()
    assert found["hooks"].available
    assert not found["broken"].available
    assert re.search(reason, str(found["broken"].problem))
    with pytest.raises(kind, match=f"Backend 'broken' .*{reason}"):
        make("broken")


@pytest.mark.parametrize("broken", ["runtime error", "no class"], indirect=True)
def test_a_broken_backend_takes_nothing_else_down(broken: str) -> None:
    model, inputs, targets = nn.Linear(3, 2), torch.randn(4, 3), torch.tensor([0, 1, 0, 1])
    loss_fn = persample.losses.cross_entropy
    found = {a.backend: a for a in persample.crosscheck(model, loss_fn, inputs, targets)}
    assert found["fused"].agrees
    assert found["broken"].mean is None
    assert "broken" in str(found["broken"].problem)
    costs = persample.benchmark(model, loss_fn, inputs, targets, backends=["hooks", "broken"], rounds=1)
    assert [cost.problem is None for cost in costs] == [True, True, False]
    persample.register_backend("mine", "third_party:Own")


@pytest.mark.parametrize("content", [b"broken\n", b"\xff\xfe\n"])
def test_a_damaged_list_of_entry_points_hides_no_other_one(importable: Path, content: bytes) -> None:
    damaged = plug_in(importable, "", "damaged")
    (damaged / "entry_points.txt").write_bytes(b"[persample.backends]\n" + content)
    plug_in(importable, "whole = persample.sources.backends.loop:LoopSource")
    assert persample.backends()["whole"].available
    assert type(make("whole")) is LoopSource


def test_an_entry_point_with_extras_and_a_nested_class(importable: Path) -> None:
    (importable / "nested_module.py").write_text(
        "from persample.sources.backends.loop import LoopSource\nclass Outer:\n    Inner = LoopSource\n"
    )
    plug_in(importable, "nested = nested_module:Outer.Inner [extra]")
    assert type(make("nested")) is LoopSource
    del sys.modules["nested_module"]


def test_options_that_are_passed_on(importable: Path) -> None:
    (importable / "passing_on.py").write_text(
        "from persample.sources.backends.fused import FusedSource\n"
        "class Named(FusedSource):\n"
        "    def __init__(self, model, loss_fn, depth=1, **options):\n"
        "        super().__init__(model, loss_fn, **options)\n"
        "        self.depth = depth\n"
        "class All(FusedSource):\n"
        "    def __init__(self, *args, **kwargs):\n"
        "        super().__init__(*args, **kwargs)\n"
    )
    for name in ("Named", "All"):
        persample.register_backend(name, f"passing_on:{name}")
    arguments = (nn.Linear(3, 2), persample.losses.cross_entropy)
    source = persample.make_source("Named", *arguments, depth=2, deterministic=True, check="never")
    assert (source.depth, source.deterministic, source.check) == (2, True, "never")  # type: ignore[attr-defined]
    assert persample.make_source("All", *arguments, check="always").check == "always"
    own = "'deterministic', 'compile', 'check'"
    for name, known in (("Named", f"'depth', {own}"), ("All", own)):
        with pytest.raises(OptionError, match=f"'{name}' has no option 'modus': it takes {known}"):
            persample.make_source(name, *arguments, modus=1)
    del sys.modules["passing_on"]
