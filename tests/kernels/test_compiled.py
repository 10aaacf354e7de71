"""Whether compiled kernels serve, and what is said if not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import persample
from persample.kernels import compiled

HERE = Path(compiled.__file__).parent

needs_kernels = pytest.mark.skipif(compiled.instruction_set() is None, reason="no kernels here")
on_x86 = pytest.mark.skipif(not list(HERE.glob("_kernels_avx2.so")), reason="no kernels for x86 here")


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """The compiled libraries, with their sources, in a folder of their own."""
    for library in HERE.glob("*.so"):
        shutil.copy(library, tmp_path)
    shutil.copytree(HERE / "csrc", tmp_path / "csrc")
    return tmp_path


def test_an_environment_variable_switches_them_off() -> None:
    code = "import persample; print(persample.backends()['fused'].kernels)"
    environment = os.environ | {"PERSAMPLE_KERNELS": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "no C++ kernels: PERSAMPLE_KERNELS=0 switches them off\n"


@needs_kernels
def test_they_are_switched_off_for_a_while() -> None:
    used = compiled.about_kernels()
    with compiled.without_kernels():
        with compiled.without_kernels():
            pass
        assert compiled.instruction_set() is None
        assert persample.backends()["fused"].kernels == "no C++ kernels: they are switched off by without_kernels()"
    assert persample.backends()["fused"].kernels == compiled.about_kernels() == used


@on_x86
def test_a_processor_without_vectors_does_without_them(copied: Path) -> None:
    assert compiled.best_library(copied, "DEFAULT") == "there are none for this processor (PyTorch calls it DEFAULT)"


@on_x86
def test_those_for_avx2_take_the_place_of_those_for_avx_512(copied: Path) -> None:
    assert compiled.best_library(copied, "AVX512")[0] == "avx512"
    assert compiled.best_library(copied, "AVX2")[0] == "avx2"
    (copied / "_kernels_avx512.so").unlink()
    assert compiled.best_library(copied, "AVX512")[0] == "avx2"


@on_x86
def test_without_a_compiler_it_is_said(tmp_path: Path) -> None:
    assert "installed without a C++ compiler" in compiled.best_library(tmp_path, "AVX2")


@on_x86
def test_kernels_of_other_sources_are_not_used(copied: Path) -> None:
    with (copied / "csrc" / "step.cpp").open("a") as source:
        source.write("// changed\n")
    assert "was compiled from other sources" in compiled.best_library(copied, "AVX2")


@on_x86
def test_what_is_no_library_is_told(copied: Path) -> None:
    (copied / "_kernels_avx2.so").write_bytes(b"no library")
    assert "cannot be loaded" in compiled.best_library(copied, "AVX2")


def test_the_backends_that_have_none_say_nothing_of_them() -> None:
    assert persample.backends()["loop"].kernels == ""
