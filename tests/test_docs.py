"""README and docs: links lead somewhere, no backend is left out. Their code blocks run by the root `conftest.py`."""

from __future__ import annotations

import importlib
import re
from contextlib import suppress
from pathlib import Path

import pytest

import persample
from persample.errors import MissingPackageError

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_to_files_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    missing = [t for t in targets if "://" not in t and not (page.parent / t).exists()]
    assert missing == []


@pytest.mark.parametrize("page", ["README.md", "docs/backends.md"])
def test_every_backend_has_a_row_in_the_table(page: str) -> None:
    rows = re.findall(r'^\| `"(\w+)"` \|', (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE)
    own = {name for name, backend in persample.backends().items() if backend.location.startswith("persample.")}
    assert own <= set(rows)


def is_public(package: str) -> bool:
    """Whether users import from it: first-level packages, and the integrations, each of which needs its own package."""
    return package.removeprefix("persample.integrations.").count(".") <= 1


def test_the_reference_documents_what_first_level_packages_name() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "reference").glob("*.md"))
    names = re.findall(r"^\.\. auto(?:class|function|exception|data):: (\S+)", text, flags=re.MULTILINE)
    assert names
    for name in names:
        package, _, attribute = name.rpartition(".")
        assert is_public(package), f"{name} is deep inside: let a first-level package name it"
        with suppress(MissingPackageError):
            assert hasattr(importlib.import_module(package), attribute), name


FOR_USERS = [page for page in PAGES if page.name != "architecture.md"]  # which shows where to change the inside


@pytest.mark.parametrize("page", FOR_USERS, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_examples_import_from_first_level_packages(page: Path) -> None:
    packages = re.findall(r"^(?:from|import) (persample[\w.]*)", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert [package for package in packages if not is_public(package)] == []
