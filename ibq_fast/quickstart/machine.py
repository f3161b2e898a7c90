"""The machine a run was made on, as far as it explains the run's times."""

from __future__ import annotations

import os
import platform
import resource
import sys
from pathlib import Path

import torch

import ibq_fast


def usable_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe_machine(device: torch.device) -> dict[str, str | int | float]:
    """Processor, cores, instruction set, device and versions."""
    described: dict[str, str | int | float] = {
        "processor": _processor(),
        "cores": usable_cores(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "ibq_fast": ibq_fast.__version__,
    }
    return described


def peak_memory_gigabytes() -> float:
    """Most memory this process has held so far, in 10⁹ bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9


def multiplies_bfloat16() -> bool:
    """Whether this processor has bfloat16 products: autocast is faster with them and slower without."""
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
