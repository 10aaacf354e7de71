"""What `pyproject.toml` cannot say: the README for an index page, and the C++ kernels.

The kernels are optional: where they cannot be compiled, the package is installed without them and works. They know
neither Python's nor PyTorch's headers, so one wheel serves all versions of both. `PERSAMPLE_KERNELS=0` leaves them out.
"""

import os
import platform
import re
import runpy
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

REPOSITORY = "persample/persample"
KERNELS = Path("src/persample/kernels")

#: The instruction sets for which the kernels are compiled, each into a library of its own, with the compiler's options.
INSTRUCTION_SETS = {
    "x86_64": {
        "avx2": ["-mavx2", "-mfma"],
        "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"],
    },
    "aarch64": {"neon": []},
}

# OpenMP is compiled in, but not linked: the symbols are found in the library that PyTorch has loaded, so that both
# share one pool of threads.
# No option changes a value, a NaN or an infinity: two say that nobody asks for `errno` and for traps. Products are
# fused with sums where the sources say so (`std::fma`), nowhere else, so that no compiler decides on rounding.
OPTIONS = [
    *("-std=c++17", "-O3", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"),
    *("-fvisibility=hidden", "-fno-exceptions", "-fno-rtti", "-g0"),
]


class BuildKernels(build_ext):
    """Names the libraries without the version of Python, which they do not depend on."""

    def build_extensions(self) -> None:
        self.parallel = False  # they are compiled from the same sources, into the same object files
        super().build_extensions()

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")).with_suffix(".so"))


class KernelsWheel(bdist_wheel):
    """Tags the wheel with the platform, if it holds kernels, but not with the version of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def kernels() -> list[Extension]:
    """Return the libraries of kernels that can be compiled for this machine."""
    if sys.platform != "linux" or os.environ.get("PERSAMPLE_KERNELS") == "0":
        return []
    fingerprint = runpy.run_path(str(KERNELS / "fingerprint.py"))["fingerprint_of"](KERNELS / "csrc")
    return [
        Extension(
            f"persample.kernels._kernels_{name}",
            sorted(map(str, KERNELS.glob("csrc/*.cpp"))),
            depends=[__file__, *sorted(map(str, KERNELS.glob("csrc/*.h")))],
            define_macros=[("PERSAMPLE_FINGERPRINT", f'"{fingerprint}"')],
            extra_compile_args=OPTIONS + options,
            language="c++",
            optional=True,
        )
        for name, options in INSTRUCTION_SETS.get(platform.machine(), {}).items()
    ]


readme = (Path(__file__).parent / "README.md").read_text(encoding="utf-8")
readme = re.sub(r"!\[([^]]*)\]\((?!https?:)", rf"![\1](https://raw.githubusercontent.com/{REPOSITORY}/main/", readme)
readme = re.sub(r"(?<!!)\[([^]]*)\]\((?!https?:|#)", rf"[\1](https://github.com/{REPOSITORY}/blob/main/", readme)
setup(
    long_description=readme,
    long_description_content_type="text/markdown",
    ext_modules=kernels(),
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": KernelsWheel},
)
