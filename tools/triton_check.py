"""Compiles the Triton kernels ahead of time and holds them to their budgets, without a GPU.

    triton_check.py --budgets ibq_fast/ops/triton/budgets.json [--jobs 2] [--architecture sm_90 ...]

Each kernel is compiled with the tiles of the committed table for sm_80, sm_90 and sm_100: in bfloat16 at D
= 256 in every use, in float16 and float32 where they are hottest, at C = 1,024 those of the cross entropy.
The cubins are read with the cuobjdump inside the Triton wheel: registers, local memory (spills), shared and
tensor memory, and whether the disassembly multiplies matrices with the architecture's own instruction.
Exits with 1 if a budget is broken. Compiled kernels are kept in TRITON_CACHE_DIR, build/triton unless set.
"""

# ruff: noqa: T201 (the table on standard output is what this script is for)
from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
WIDTHS = {"bf16": 2, "fp16": 2, "fp32": 4}

SWEEP = dict.fromkeys(("LSE", "READOUT", "ENTROPY", "TARGET", "SMOOTH"), False)
GROUPS = dict.fromkeys(("SELECT", "ENTROPY", "TARGET", "SKIP"), False)
SKIP = {"SKIP": True}

# Use -> (module of the kernel, entry in the table of tiles, flags).
USES: dict[str, tuple[str, str, dict[str, bool]]] = {
    "search": ("row_sweep", "search", SWEEP),
    "select": ("row_sweep", "select", SWEEP | {"LSE": True, "READOUT": True}),
    "statistics": ("row_sweep", "statistics", SWEEP | {"ENTROPY": True}),
    "joint": ("row_sweep", "joint", SWEEP | {"LSE": True, "READOUT": True, "ENTROPY": True}),
    "loss": ("row_sweep", "cross_entropy", SWEEP | {"LSE": True, "TARGET": True}),
    "column_means": ("column_means", "column_means", {"BOUND": True}),
    "moments": ("moments", "moments", SKIP),
    "rows, select": ("row_gradient", "row_gradient", GROUPS | {"SELECT": True}),
    "rows, entropies": ("row_gradient", "row_gradient", GROUPS | {"ENTROPY": True}),
    "rows, joint": ("row_gradient", "row_gradient", GROUPS | {"SELECT": True, "ENTROPY": True}),
    "rows, skipping": ("row_gradient", "row_gradient", GROUPS | {"SELECT": True, "ENTROPY": True} | SKIP),
    "rows, loss": ("row_gradient", "loss_row_gradient", GROUPS | {"TARGET": True}),
    "codes, select": ("code_gradient", "code_gradient", GROUPS | {"SELECT": True}),
    "codes, entropies": ("code_gradient", "code_gradient", GROUPS | {"ENTROPY": True}),
    "codes, joint": ("code_gradient", "code_gradient", GROUPS | {"SELECT": True, "ENTROPY": True}),
    "codes, skipping": ("code_gradient", "code_gradient", GROUPS | {"SELECT": True, "ENTROPY": True} | SKIP),
    "codes, loss": ("code_gradient", "loss_code_gradient", GROUPS | {"TARGET": True}),
}
# Kernels that join partial results: no tile of the table, nothing to multiply. Use -> (module, kernel,
# flags).
FINISHERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "finish rows, joint": (
        "finish_rows",
        "finish_rows",
        SWEEP | {"LSE": True, "READOUT": True, "ENTROPY": True, "ROWS": 16},
    ),
    "finish rows, loss": (
        "finish_rows",
        "finish_rows",
        SWEEP | {"LSE": True, "TARGET": True, "SMOOTH": True, "ROWS": 16},
    ),
    "finish rows' gradient": (
        "finish_gradients",
        "finish_row_gradient",
        {"FIRST": True, "ENTROPY": True, "ROWS": 16},
    ),
    "finish codes' gradient": (
        "finish_gradients",
        "finish_code_gradient",
        {"HITS": True, "NORMS": True, "CODES": 16, "ROWS": 16},
    ),
    "histogram": ("histogram", "count_codes", {"ROWS": 256}),
}
HOTTEST = ("search", "joint", "rows, joint", "codes, joint")
WIDE = ("loss", "rows, loss", "codes, loss")
CASES = (
    *((use, "bf16", 256) for use in USES),
    *((use, "fp16", 256) for use in HOTTEST),
    *((use, "fp32", 256) for use in HOTTEST),
    *((use, "bf16", 1024) for use in WIDE),
    *((use, "bf16", 256) for use in FINISHERS),
)

INTEGERS = ("n", "k", "row_tiles", "code_tiles", "splits", "tiles_per_split")
NUMBERS = ("scale", "inverse_tau", "hit", "share", "smoothing", "norm_weight")
INDICES = {
    "index": "*i32",
    "walk": "*i32",
    "peaks": "*i32",
    "counts": "*i32",
    "targets": "*i64",
    "ignored": "i64",
    "out_index": "*i64",
    "order": "*i64",
    "starts": "*i64",
    "indices": "*i64",
}
OPERANDS = ("z", "e", "g", "grad_z", "grad_e", "grad_z_q", "grad_codes")


@dataclass
class Compiled:
    """One kernel for one architecture; matrix counts its matrix instructions."""

    architecture: str
    use: str
    dtype: str
    dimension: int
    tile: str
    registers: int
    local: int
    shared: int
    tensor: int
    matrix: int


def signature(names: list[str], constants: dict[str, Any], dtype: str) -> dict[str, str]:
    """Triton's types of a kernel's arguments; every pointer that is neither operand nor index is float32."""
    types = {}
    for name in names:
        if name in constants:
            types[name] = "constexpr"
        elif name in INTEGERS:
            types[name] = "i32"
        elif name in NUMBERS:
            types[name] = "fp32"
        else:
            types[name] = INDICES.get(name, f"*{dtype}" if name in OPERANDS else "*fp32")
    return types


def build(architecture: str, use: str, dtype: str, dimension: int) -> Compiled:
    """Compiles one case, with N, K and every pointer divisible by 16, as PyTorch's allocations are."""
    import triton
    from triton.backends.compiler import GPUTarget

    from ibq_fast.ops.triton import live, plan

    module, name, flags = USES.get(use) or FINISHERS[use]
    if architecture in live.UNBOUNDED:
        flags = flags | dict.fromkeys(flags.keys() & {"BOUND", "SKIP"}, False)
    kernels = importlib.import_module(f"ibq_fast.ops.triton.kernels.{module}")
    if use in USES:
        kernel = getattr(kernels, module)
        blocks = plan.fit(architecture, name, WIDTHS[dtype], dimension)
        tile = f"{blocks.tile.rows}x{blocks.tile.codes} w{blocks.tile.warps} s{blocks.tile.stages}"
        constants = blocks.constants(
            D=dimension, OUT=blocks.out, BIAS=True, EVEN=True, PRECISION="tf32x3", **flags
        )
        options = {key: constants[key] for key in ("num_warps", "num_stages")}
    else:
        kernel, tile, options = getattr(kernels, name), "", {}
        constants = {"D": dimension, "OUT": 256, **flags}
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
    types = signature(kernel.arg_names, constants, dtype)
    divisible = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if types[name].startswith("*") or name in ("n", "k")
    }
    source = triton.compiler.ASTSource(kernel, types, constants, divisible)
    target = GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
    compiled = triton.compile(source, target=target, options=options)
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        usage, sass = (
            subprocess.run(
                [str(tools / "cuobjdump"), flag, str(cubin)], capture_output=True, text=True, check=True
            ).stdout
            for flag in ("-res-usage", "-sass")
        )
    return Compiled(
        architecture,
        use,
        dtype,
        dimension,
        tile,
        registers=_resource(usage, "REG"),
        local=_resource(usage, "STACK") + _resource(usage, "LOCAL"),
        shared=compiled.metadata.shared,
        tensor=getattr(compiled.metadata, "tmem_size", 0) or 0,
        matrix=len(re.findall(MATRIX[architecture], sass)),
    )


# The architecture's own matrix instruction; an older one would be a slower path.
MATRIX = {"sm_80": r"\bHMMA\b", "sm_90": r"\bHGMMA\b", "sm_100": r"\bUTC\w*MMA\b"}


def _resource(usage: str, name: str) -> int:
    found = re.search(rf"\b{name}:(\d+)", usage)
    if found is None:
        raise ValueError(f"cuobjdump -res-usage: expected {name}, got {usage!r}")
    return int(found.group(1))


def violations(kernel: Compiled, budget: dict[str, int]) -> list[str]:
    """What is wrong with one kernel."""
    wrong = [
        f"{name} above {budget[name]}"
        for name in ("registers", "local", "shared", "tensor")
        if getattr(kernel, name) > budget[name]
    ]
    return wrong if kernel.matrix or kernel.use in FINISHERS else [*wrong, "no matrix instructions"]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--budgets", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--architecture", action="append", choices=ARCHITECTURES)
    args = parser.parse_args()
    if importlib.util.find_spec("triton") is None:
        print("triton-check: Triton is not installed, its kernels were not compiled")
        return 0
    if os.environ.get("TRITON_INTERPRET"):
        parser.error("TRITON_INTERPRET: expected it unset, the interpreter compiles nothing")
    os.environ.setdefault("TRITON_CACHE_DIR", str(ROOT / "build/triton"))
    sys.path.insert(0, str(ROOT))
    budgets = json.loads(args.budgets.read_text())
    architectures = args.architecture or ARCHITECTURES
    faults = 0
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("fork")) as pool:
        jobs = {name: [pool.submit(build, name, *case) for case in CASES] for name in architectures}
        for name in architectures:
            print(f"\n{name:<24}{'dtype':<6}{'D':>5}  {'tile':<15}{'registers':>9}{'local':>7}", end="")
            print(f"{'shared':>8}{'tensor':>7}{'matrix':>8}")
            for kernel in (job.result() for job in jobs[name]):
                wrong = violations(kernel, budgets[name])
                faults += len(wrong)
                print(f"{kernel.use:<24}{kernel.dtype:<6}{kernel.dimension:>5}  {kernel.tile:<15}", end="")
                print(f"{kernel.registers:>9}{kernel.local:>7}{kernel.shared:>8}{kernel.tensor:>7}", end="")
                print(f"{kernel.matrix:>8}" + ("  <- " + ", ".join(wrong) if wrong else ""), flush=True)
    verdict = "within budget" if faults == 0 else f"{faults} violations"
    print(f"\nTriton check: {len(CASES) * len(architectures)} kernels compiled, {verdict}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
