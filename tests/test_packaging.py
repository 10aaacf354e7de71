"""What users install: an sdist and a wheel that work beside torch alone."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from persample.kernels.compiled import instruction_set

ROOT = Path(__file__).parents[1]
HOSTS = (("raw.githubusercontent.com", ""), ("github.com", "blob/"))


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build both from a copy of the checkout, the wheel from the sdist."""
    folder = tmp_path_factory.mktemp("archives")
    source = tmp_path_factory.mktemp("source") / "persample"
    tracked = _run(["git", "ls-files", "-z"], ROOT).split("\0")
    for name in filter(None, tracked):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    _run([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(source)], folder)
    return folder


def test_the_wheel_holds_the_package_and_the_licence(archives: Path) -> None:
    (wheel,) = archives.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()

    ours = {str(path.relative_to(ROOT / "src")) for path in (ROOT / "src").rglob("*.py")}
    assert ours <= set(names)
    assert "persample/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if name.startswith(("tests/", "docs/", "benchmarks/"))]


@pytest.mark.skipif(instruction_set() is None, reason="nothing compiles kernels here")
def test_the_wheel_holds_kernels_for_all_versions_of_python(archives: Path) -> None:
    (wheel,) = archives.glob("*.whl")
    kernels = [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]
    assert kernels
    assert all(re.fullmatch(r"persample/kernels/_kernels_\w+\.so", name) for name in kernels)
    assert "-py3-none-linux_" in wheel.name


def test_links_and_pictures_of_the_readme_resolve_on_an_index_page(archives: Path) -> None:
    (wheel,) = archives.glob("*.whl")
    files = zipfile.ZipFile(wheel)
    (name,) = (name for name in files.namelist() if name.endswith("METADATA"))
    description = files.read(name).decode()

    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", description)
    links = re.findall(r"(?<!!)\[[^]]*\]\(([^)]+)\)", description)
    raw, blob = (f"https://{host}/persample/persample/{rest}main/" for host, rest in HOSTS)
    assert pictures
    assert links
    assert all((ROOT / address.removeprefix(raw)).is_file() for address in pictures)
    assert all((ROOT / address.removeprefix(blob).partition("#")[0]).is_file() for address in links)


def test_the_sdist_holds_what_the_wheel_is_made_of(archives: Path) -> None:
    (sdist,) = archives.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}

    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "src/persample/kernels/csrc").iterdir()}
    assert {"pyproject.toml", "README.md", "LICENSE", "src/persample/py.typed"} | sources <= names


def test_the_wheel_works_beside_torch_alone(archives: Path, tmp_path: Path) -> None:
    (wheel,) = archives.glob("*.whl")
    environment = tmp_path / "environment"
    venv.create(environment, symlinks=True)
    (site,) = environment.glob("lib/*/site-packages")
    for path in _installed_of("torch"):
        if not (site / path.name).exists():
            (site / path.name).symlink_to(path)
    zipfile.ZipFile(wheel).extractall(site)
    code = """
import sys, warnings
warnings.simplefilter("ignore")  # torch speaks of the NumPy that is not there
import torch, persample
model, x, y = torch.nn.Linear(3, 2), torch.ones(4, 3), torch.tensor([0, 1, 0, 1])
for name, backend in persample.backends().items():
    if backend.available:
        persample.make_source(name, model, persample.losses.cross_entropy).moments(x, y)
optimizer = persample.VOGN(model, persample.losses.cross_entropy, data_size=4, lr=0.1, hess_init=1.0)
optimizer.observe(x, y)
optimizer.step()
print(optimizer.predict(x, samples=3).probabilities.shape, "numpy" in sys.modules, persample.__file__)
"""
    out = _run([str(environment / "bin" / "python"), "-c", code], tmp_path)
    assert out.startswith(f"torch.Size([4, 2]) False {site}")


def _installed_of(package: str) -> Iterator[Path]:
    """Yield the top folders and files of an installed package and of everything that it needs itself."""
    seen, due = set[str](), [package]
    while due:
        distribution = metadata.distribution(due.pop())
        name = distribution.metadata["Name"].lower()
        if name in seen:
            continue
        seen.add(name)
        tops = {file.parts[0] for file in distribution.files or () if file.parts[0] not in ("..", "__pycache__")}
        yield from (Path(str(distribution.locate_file(top))) for top in tops)
        requirements = [Requirement(text) for text in distribution.requires or ()]
        due += [r.name for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]


def _run(command: list[str], folder: Path) -> str:
    """Run a command without the paths of this process, and return what it prints."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
