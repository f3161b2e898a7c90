"""The machine: its measured limits, its name, its memory, and the versions of what runs on it."""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "bench" / "native"
BUILD = ROOT / "build" / "bench"
KINDS = {"float32": 0, "bfloat16": 1}

# What a commit's figures depend on; results and pages written by a run do not make it dirty.
MEASURED_PATHS = ("ibq_fast", "kernels", "csrc", "bench/*.py", "bench/native", "CMakeLists.txt", "setup.py")
PACKAGES = ("torch", "numpy", "faiss-cpu", "vector-quantize-pytorch")


@functools.cache
def _library() -> ctypes.CDLL:
    """The measuring library, built by CMake when it is missing or older than its source."""
    built = BUILD / "libibq_peak.so"
    newest = max(path.stat().st_mtime for path in SOURCE.iterdir())
    if not built.exists() or built.stat().st_mtime < newest:
        beside = Path(sys.executable).parent / "cmake"
        cmake = str(beside) if beside.exists() else shutil.which("cmake")
        if cmake is None:
            raise RuntimeError("bench: cmake was not found; `pip install cmake` provides it")
        for command in (
            [cmake, "-S", str(SOURCE), "-B", str(BUILD)],
            [cmake, "--build", str(BUILD), "--target", "ibq_peak"],
        ):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"bench: {' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    library = ctypes.CDLL(str(built))
    library.ibq_peak_flops.restype = ctypes.c_double
    library.ibq_peak_flops.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_double]
    library.ibq_peak_isa.restype = ctypes.c_char_p
    library.ibq_read_bandwidth.restype = ctypes.c_double
    library.ibq_read_bandwidth.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_double]
    return library


def peak_gflops(dtype: str, seconds: float = 0.03) -> float:
    """GFLOP/s of a register-only multiply-add loop on as many threads as torch uses; 0 without the
    instruction."""
    return _library().ibq_peak_flops(KINDS[dtype], torch.get_num_threads(), seconds) / 1e9


def peak_isa(dtype: str) -> str:
    """The instruction set of :func:`peak_gflops`."""
    return _library().ibq_peak_isa(KINDS[dtype]).decode()


@functools.cache
def read_bandwidth(megabytes: int = 512, seconds: float = 0.3) -> float:
    """GB/s read from memory by as many threads as torch uses: the best of three."""
    data = torch.ones(megabytes << 18)
    size = data.numel() * 4
    call = _library().ibq_read_bandwidth
    return max(call(data.data_ptr(), size, torch.get_num_threads(), seconds) for _ in range(3)) / 1e9


def available_bytes() -> int:
    """Memory that can be taken without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/meminfo: expected a line MemAvailable, got none")


def device_name() -> str:
    """The processor's model and instruction set, as the tables name it."""
    model = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    return f"{model} ({peak_isa('bfloat16') or peak_isa('float32')})"


def commit() -> str:
    """The commit that is measured, with ``-dirty`` when measured code differs from it."""

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", *args], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", *MEASURED_PATHS)
    return git("rev-parse", "--short=10", "HEAD") + ("-dirty" if changed else "")


def versions() -> dict[str, str]:
    """Versions of ibq_fast and of the libraries it is measured against; "" where not installed."""
    import ibq_fast

    found = {"ibq_fast": ibq_fast.__version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = ""
    return found
