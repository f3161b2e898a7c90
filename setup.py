"""Builds the compiled extension through CMake and puts the CUDA sources into the package, where the cupy
backend finds them; everything else is in pyproject.toml.

``IBQ_FAST_CUDA=auto|on|off`` chooses CUDA kernels (auto: when nvcc is found), ``MAX_JOBS`` the parallelism,
``IBQ_FAST_CUDA_ARCHITECTURES`` what they are compiled for (CMake's list; default 80-real;90a-real;100a-real).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
PYTHON_ABI = "cp310"


def find_tool(name: str) -> str | None:
    """The tool of this Python's environment, else the one on the PATH."""
    return shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))


class CMakeBuild(build_ext):
    """Runs CMake for ``ibq_fast._C`` and leaves the module where setuptools wants it."""

    def build_extension(self, ext: Extension) -> None:
        cmake = find_tool("cmake")
        if cmake is None:
            raise SystemExit("ibq_fast: cmake was not found; `pip install cmake ninja` provides it.")
        if not any(shutil.which(c) for c in (os.environ.get("CXX", ""), "c++", "g++", "clang++") if c):
            raise SystemExit("ibq_fast: no C++ compiler was found; install g++ 11 or newer, or set CXX.")
        cuda = os.environ.get("IBQ_FAST_CUDA", "auto")
        if cuda not in ("auto", "on", "off"):
            raise SystemExit(f"IBQ_FAST_CUDA: expected auto, on or off, got {cuda!r}")
        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        output.mkdir(parents=True, exist_ok=True)
        build = ROOT / "build" / "cmake"
        configure = [
            cmake, "-S", str(ROOT), "-B", str(build),
            f"-DPython3_EXECUTABLE={sys.executable}",
            f"-DIBQ_FAST_OUTPUT={output}",
            f"-DIBQ_FAST_CUDA={cuda}",
        ]  # fmt: skip
        ninja = find_tool("ninja")
        if ninja and not (build / "CMakeCache.txt").exists():
            configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        if architectures := os.environ.get("IBQ_FAST_CUDA_ARCHITECTURES"):
            configure.append(f"-DCMAKE_CUDA_ARCHITECTURES={architectures}")
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        for command in (configure, [cmake, "--build", str(build), "--target", "_C", "--parallel", jobs]):
            if subprocess.run(command, cwd=ROOT).returncode:
                raise SystemExit(f"ibq_fast: the build failed at `{' '.join(command[:2])} …`; see above.")


class WithCudaSources(build_py):
    """Copies the headers that are compiled at run time; an editable install finds them in the checkout."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for folder in ("common", "cuda"):
            target = Path(self.build_lib) / "ibq_fast" / "_kernels" / folder
            target.mkdir(parents=True, exist_ok=True)
            for source in (ROOT / "kernels" / folder).iterdir():
                if source.suffix in (".h", ".cuh"):
                    shutil.copy2(source, target)


class LimitedApiWheel(bdist_wheel):
    """One wheel for every CPython from 3.10 on."""

    def finalize_options(self) -> None:
        self.py_limited_api = PYTHON_ABI
        super().finalize_options()


setup(
    ext_modules=[Extension("ibq_fast._C", sources=[], py_limited_api=True)],
    cmdclass={"build_ext": CMakeBuild, "build_py": WithCudaSources, "bdist_wheel": LimitedApiWheel},
)
