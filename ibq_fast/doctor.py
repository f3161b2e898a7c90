"""``ibq-fast doctor``: what is installed, what is used, and why. Each section reports its own failure as a
line.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator
from importlib import metadata

from ibq_fast import npu

_PACKAGES = (
    "torch",
    "accelerate",
    "safetensors",
    "huggingface_hub",
    "jsonargparse",
    "numpy",
    "pillow",
    "triton",
    "cupy-cuda13x",
    "lpips",
    "torch-npu",
)


def report() -> str:
    """The report as text; never raises."""
    sections: tuple[tuple[str, Callable[[], Iterator[str]]], ...] = (
        ("versions", _versions),
        ("compiled extension", _extension),
        ("devices", _devices),
        ("GPU kernels shown to be right by committed results", _proven),
        ("backends", _backends),
    )
    lines: list[str] = []
    for title, section in sections:
        lines.append(title)
        lines += [f"  {line}" for line in _lines(section)]
    return "\n".join(lines) + "\n"


def _lines(section: Callable[[], Iterator[str]]) -> list[str]:
    found: list[str] = []
    try:
        found.extend(section())
    except Exception as error:  # the broken installation is what this command is for
        found.append(f"could not be examined: {type(error).__name__}: {error}")
    return found


def _versions() -> Iterator[str]:
    from ibq_fast import __version__

    yield f"{'ibq_fast':16}{__version__}"
    yield f"{'python':16}{platform.python_version()} on {platform.platform()}"
    for name in _PACKAGES:
        try:
            yield f"{name:16}{metadata.version(name)}"
        except metadata.PackageNotFoundError:
            yield f"{name:16}not installed"


def _extension() -> Iterator[str]:
    from ibq_fast.ops import native

    if native.UNAVAILABLE is not None:
        yield f"not in use: {native.UNAVAILABLE}"
        return
    from ibq_fast import _C

    yield f"built as        {_C.__file__}"
    forced = os.environ.get("IBQ_FAST_CPU_ISA")
    chosen = _C.cpu_isa()
    why = f"asked for by IBQ_FAST_CPU_ISA={forced}" if forced else "the best of those this CPU runs"
    if chosen is None:
        yield f"CPU kernels     none: IBQ_FAST_CPU_ISA={forced} is not among {_C.cpu_isas()}"
    else:
        yield f"CPU kernels     {chosen} ({why}: {_C.cpu_isas()})"


def _devices() -> Iterator[str]:
    import torch

    yield f"CPU             {_cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads in torch"
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(i)
            memory = properties.total_memory / 2**30
            yield (
                f"cuda:{i}          {properties.name}, capability {properties.major}.{properties.minor}, "
                f"{memory:.0f} GiB"
            )
    elif torch.version.cuda or torch.version.hip:
        yield "CUDA            no device, though this torch is built for one"
    else:
        yield "CUDA            none: this torch is built for the CPU alone"
    reason = npu.unavailable()
    if reason is None:
        module = torch.get_device_module("npu")
        for i in range(module.device_count()):
            yield f"npu:{i}           {module.get_device_name(i)}"
    else:
        yield f"NPU             none: {reason}"


def _proven() -> Iterator[str]:
    from ibq_fast.ops import proof

    found: dict[tuple[str, str, bool], list[str]] = {}
    for check in proof.committed().values():
        key = check.architecture, check.backend, check.passed
        found.setdefault(key, []).append(f"{check.op} ({check.dtype})")
    for (architecture, backend, passed), subjects in sorted(found.items()):
        yield f"{architecture:6} {backend:10} {'' if passed else 'failed: '}{', '.join(subjects)}"
    if not found:
        yield "none: no GPU kernel is chosen unless it is asked for"


def _backends() -> Iterator[str]:
    import torch

    from ibq_fast.ops import backend_report

    found = torch.accelerator.current_accelerator(check_available=True)
    devices = ["cpu"] if found is None else ["cpu", found.type]
    for device in devices:
        for row in backend_report(device):
            state = "used" if row.chosen else "available" if row.available else "missing"
            yield f"{device:5} {row.op:32} {row.backend:10} {state:10} {row.reason}"


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        return platform.machine()
    return platform.processor() or platform.machine()
