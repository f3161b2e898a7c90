"""Loads the CUDA kernels and their glue without a GPU and says what is undefined or unregistered.

    cuda_link.py build/cmake/ibq_cuda_linked.so

The library is what a GPU machine links, for one architecture, and the CUDA runtime is in it; a driver is
looked for only when a kernel is called. Exits with 1 unless every symbol resolves, every function of
``ibq_cuda.h`` is there, and every operator with a CPU kernel has one for CUDA, decoding's aside.
"""

# ruff: noqa: T201 (its verdict on standard output is what this script is for)
from __future__ import annotations

import ctypes
import os
import re
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
CPU_ALONE = {"ibq_fast::generator_step", "ibq_fast::skinny_linear"}
HEADER = ROOT / "kernels" / "cuda" / "ibq_cuda.h"


def functions(header: str) -> list[str]:
    """Names of the functions that a C header declares."""
    code = re.sub(r"//[^\n]*", "", header)
    return re.findall(r"\b(ibq_cuda_\w+)\(", code)


def operators(key: str) -> set[str]:
    """Names of the operators of this project that have a kernel for a dispatch key."""
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("ibq_fast::")]
    return {name for name in names if torch._C._dispatch_has_kernel_for_dispatch_key(name, key)}


def check(path: Path) -> list[str]:
    """What is wrong with the library, a line each; OSError when it cannot be loaded."""
    import ibq_fast  # noqa: F401 (registers the schemas)

    before = operators("CUDA")
    library = ctypes.CDLL(str(path), mode=os.RTLD_NOW | os.RTLD_LOCAL)
    wrong = [
        f"{name}: declared, not there" for name in functions(HEADER.read_text()) if not hasattr(library, name)
    ]
    missing = operators("CPU") - operators("CUDA") - CPU_ALONE
    wrong += [f"{name}: no CUDA kernel is registered" for name in sorted(missing)]
    if before:
        wrong.append(f"{', '.join(sorted(before))}: registered for CUDA before the library was loaded")
    library.ibq_cuda_hopper_refusal.restype = ctypes.c_char_p
    said = library.ibq_cuda_hopper_refusal(None, None, *(ctypes.c_int64(n) for n in (256, 8192, 256)), 1)
    print(f"Hopper kernels here: {said.decode() if said else 'taken'}")
    return wrong


def main() -> int:
    path = Path(sys.argv[1]).resolve()
    try:
        wrong = check(path)
    except OSError as error:
        wrong = [str(error)]
    for line in wrong:
        print(line)
    count = len(functions(HEADER.read_text()))
    verdict = f"{len(wrong)} faults" if wrong else "complete"
    print(f"CUDA link check: {path.name}, {count} functions, {verdict}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
