"""Peak extra memory of one call, measured in a process of its own.

The high-water mark of resident memory (VmHWM) is reset after the inputs exist and the libraries are warm, so
what is counted is what the call adds: its outputs, gradients and workspace.
"""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from bench.cases import Case
from bench.machine import ROOT
from bench.suites import SUITES

_WARM_ROWS, _WARM_CODES = 8, 64


@dataclass(frozen=True)
class Probe:
    """bytes: high-water mark of the call above the memory before it. seconds: how long the call took."""

    bytes: int
    seconds: float


def measure(kernel: str, case: Case, entry: str, threads: int) -> Probe:
    """Run one call of ``entry`` in a fresh process. Raises RuntimeError when that fails."""
    request = json.dumps({"kernel": kernel, "case": asdict(case), "entry": entry, "threads": threads})
    done = subprocess.run(
        [sys.executable, "-m", "bench.memory", request], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"bench.memory: {entry} at {case.label} failed:\n{done.stderr[-2000:]}")
    return Probe(**json.loads(done.stdout.splitlines()[-1]))


def status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status: expected a line {field}, got none")


def _probe(kernel: str, case: Case, entry_name: str) -> Probe:
    suite = SUITES[kernel]
    entry = next(entry for entry in suite.entries if entry.name == entry_name)
    # A compiler needs its own shape to be warm; for everything else a small one loads what there is to load.
    warm_case = case if entry.compiles else replace(case, n=_WARM_ROWS, k=_WARM_CODES)
    entry.prepare(suite.problem(warm_case))()
    call = entry.prepare(suite.problem(case))
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # memory that is free but resident would hide what the call takes
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    begun = time.perf_counter()
    result = call()
    seconds = time.perf_counter() - begun
    peak = status("VmHWM")
    del result
    return Probe(peak - before, seconds)


def main() -> None:
    import torch

    request = json.loads(sys.argv[1])
    torch.set_num_threads(request["threads"])
    case = Case(**{**request["case"], "entries": tuple(request["case"]["entries"])})
    print(json.dumps(asdict(_probe(request["kernel"], case, request["entry"]))))


if __name__ == "__main__":
    main()
