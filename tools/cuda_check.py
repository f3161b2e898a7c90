"""Holds compiled CUDA kernels to their budgets without a GPU: registers, spills, matrix instructions.

    cuda_check.py compile --nvcc nvcc --architecture sm_90a --output DIR/sm_90a/x.cubin x.cu
    cuda_check.py report --budgets kernels/cuda/budgets.json DIR

`compile` writes the cubin and, beside it, ptxas's report (.ptxas), the PTX (.ptx) and the object that is
linked (.o). `report` reads DIR/<architecture>/ and prints a table for each; it exits with 1 if a kernel
breaks its budget, has none, or a budget has no kernel. Matrix instructions are counted in the disassembly
(HMMA, HGMMA, UTC*MMA) where cuobjdump is found: on the PATH, beside nvcc, or in an installed triton wheel.
Elsewhere they are counted in the PTX, and the table says so.

A budget holds for every architecture, or for those it names: {"registers": 168, "spill_bytes": 0,
"matrix_instructions": true, "instructions": ["HGMMA", "UTMALDG"], "architectures": ["sm_90a"]}. Each of
"instructions" has to occur. Where ptxas says that it serialised wgmma or ignored setmaxnreg, that is a fault.
"""

# ruff: noqa: T201 (the table on standard output is what this script is for)
from __future__ import annotations

import argparse
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SASS_MATRIX = re.compile(r"\b(HMMA|HGMMA|UTC\w*MMA)\b")
PTX_MATRIX = re.compile(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b")
ARCHITECTURE_ORDER = re.compile(r"\d+")
# What `instructions` of a budget looks like in PTX, where there is no disassembly.
PTX_OF = {"HGMMA": "wgmma.mma_async", "UTMALDG": "cp.async.bulk.tensor"}
PTXAS_COMPLAINT = re.compile(r"(wgmma\.mma_async instructions are serialized|setmaxnreg.{0,40}ignored)", re.I)


Budget = dict[str, Any]


@dataclass
class Kernel:
    """One compiled entry function; `matrix` counts instructions that multiply matrices in its `code`."""

    symbol: str
    source: str
    registers: int
    spill_bytes: int
    matrix: int
    code: str
    complaints: list[str]


def compile_source(nvcc: str, architecture: str, source: Path, output: Path) -> int:
    """Runs nvcc once and keeps cubin, PTX, ptxas's report and object file; nothing incomplete is left."""
    output.parent.mkdir(parents=True, exist_ok=True)
    target = f"arch={architecture.replace('sm_', 'compute_')},code={architecture}"
    with tempfile.TemporaryDirectory(dir=output.parent) as kept:
        command = [nvcc, "-c", "-std=c++17", f"-gencode={target}", "-O3", "-Xcompiler=-fPIC", "-Xptxas=-v"]
        command += ["--keep", f"--keep-dir={kept}", str(source), "-o", f"{kept}/object"]
        built = subprocess.run(command, capture_output=True, text=True)
        if built.returncode != 0:
            print(built.stdout, built.stderr, file=sys.stderr)
            print(f"{source.name} does not compile for {architecture}", file=sys.stderr)
            return 1
        output.with_suffix(".ptxas").write_text(built.stderr + built.stdout)
        for suffix in (".ptx", ".cubin"):
            (found,) = Path(kept).glob(f"*{suffix}")
            found.replace(output.with_suffix(suffix))
        Path(kept, "object").replace(output.with_suffix(".o"))
    return 0


def find_cuobjdump() -> str | None:
    """Path of cuobjdump, which not every CUDA installation has; None when there is none."""
    candidates = [shutil.which("cuobjdump")]
    nvcc = shutil.which("nvcc")
    if nvcc:
        candidates.append(str(Path(nvcc).resolve().parent / "cuobjdump"))
    candidates.append("/usr/local/cuda/bin/cuobjdump")
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin:
        candidates.append(str(Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump"))
    return next((c for c in candidates if c and Path(c).is_file()), None)


def read_resources(report: str) -> dict[str, tuple[int, int]]:
    """ptxas -v output -> {mangled kernel name: (registers, bytes of spill stores and loads)}."""
    resources: dict[str, tuple[int, int]] = {}
    symbol, spills = None, 0
    for line in report.splitlines():
        if found := re.search(r"Compiling entry function '(\w+)'", line):
            symbol, spills = found.group(1), 0
        elif found := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            spills = int(found.group(1)) + int(found.group(2))
        elif symbol and (found := re.search(r"Used (\d+) registers", line)):
            resources[symbol] = (int(found.group(1)), spills)
            symbol = None
    return resources


def code_by_kernel(text: str, header: re.Pattern[str]) -> dict[str, str]:
    """{mangled name: its lines} of a disassembly or of PTX, whose functions start at `header`."""
    starts = [(found.group(1), found.start()) for found in header.finditer(text)]
    ends = [*(start for _, start in starts[1:]), len(text)]
    return {symbol: text[start:end] for (symbol, start), end in zip(starts, ends, strict=False)}


def read_code(cubin: Path, cuobjdump: str | None) -> dict[str, str]:
    if cuobjdump is None:
        return code_by_kernel(cubin.with_suffix(".ptx").read_text(), re.compile(r"\.entry\s+(\w+)\s*\("))
    sass = subprocess.run([cuobjdump, "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    return code_by_kernel(sass, re.compile(r"Function\s*:\s*(\w+)"))


def read_kernels(folder: Path, cuobjdump: str | None) -> list[Kernel]:
    kernels = []
    matrix = SASS_MATRIX if cuobjdump else PTX_MATRIX
    for cubin in sorted(folder.glob("*.cubin")):
        code = read_code(cubin, cuobjdump)
        notes = cubin.with_suffix(".ptxas").read_text()
        for symbol, (registers, spills) in read_resources(notes).items():
            text = code.get(symbol, "")
            count = sum(1 for line in text.splitlines() if matrix.search(line))
            said = [line for line in notes.splitlines() if f"'{symbol}'" in line]
            complaints = [found.group(1) for line in said if (found := PTXAS_COMPLAINT.search(line))]
            kernels.append(Kernel(symbol, cubin.stem, registers, spills, count, text, complaints))
    return kernels


def demangle(symbols: list[str]) -> dict[str, str]:
    """Readable names where c++filt is installed, the symbols themselves elsewhere."""
    tool = shutil.which("c++filt")
    if tool is None or not symbols:
        return {s: s for s in symbols}
    shown = subprocess.run([tool, *symbols], capture_output=True, text=True, check=True).stdout.splitlines()
    short = (
        re.sub(r"\(.*", "", re.sub(r"\(ibq::cuda::\w+\)", "", name).replace("ibq::cuda::", ""))
        for name in shown
    )
    return dict(zip(symbols, (re.sub(r"^void ", "", name) for name in short), strict=True))


def violations(kernel: Kernel, budgets: dict[str, Budget], from_sass: bool) -> list[str]:
    """What is wrong with one kernel. Its budget is the longest budget name that its symbol contains."""
    names = [name for name in budgets if name in kernel.symbol]
    if not names:
        return ["no budget"]
    budget = budgets[max(names, key=len)]
    wrong = []
    if kernel.registers > budget["registers"]:
        wrong.append(f"more than {budget['registers']} registers")
    if kernel.spill_bytes > budget["spill_bytes"]:
        wrong.append(f"more than {budget['spill_bytes']} bytes of spills")
    if budget["matrix_instructions"] and kernel.matrix == 0:
        wrong.append("no matrix instructions")
    for name in budget.get("instructions", []):
        if (name if from_sass else PTX_OF[name]) not in kernel.code:
            wrong.append(f"no {name}")
    return wrong + kernel.complaints


def report(root: Path, all_budgets: dict[str, Budget]) -> int:
    folders = sorted(
        (f for f in root.iterdir() if f.is_dir()), key=lambda f: int(ARCHITECTURE_ORDER.findall(f.name)[0])
    )
    cuobjdump = find_cuobjdump()
    column, where = (
        ("HMMA", f"disassembly by {cuobjdump}") if cuobjdump else ("mma (PTX)", "PTX: no cuobjdump found")
    )
    print(f"matrix instructions counted in the {where}")
    bad = 0 if folders else 1
    summary = []
    for folder in folders:
        kernels = read_kernels(folder, cuobjdump)
        budgets = {
            name: budget
            for name, budget in all_budgets.items()
            if folder.name in budget.get("architectures", [folder.name])
        }
        names = demangle([k.symbol for k in kernels])
        width = max([len(n) for n in names.values()] + [6])
        print(f"\n{folder.name:<{width}}  {'registers':>9}  {'spill bytes':>11}  {column:>9}")
        faults = 0
        for kernel in sorted(kernels, key=lambda k: names[k.symbol]):
            wrong = violations(kernel, budgets, cuobjdump is not None)
            faults += len(wrong)
            matrix = f"yes ({kernel.matrix})" if kernel.matrix else "no"
            row = f"{names[kernel.symbol]:<{width}}  {kernel.registers:>9}  {kernel.spill_bytes:>11}"
            print(f"{row}  {matrix:>9}" + ("  <- " + ", ".join(wrong) if wrong else ""))
        for name in budgets:
            if not any(name in k.symbol for k in kernels):
                print(f"{name}: has a budget but was not compiled")
                faults += 1
        bad += faults
        verdict = "within budget" if faults == 0 else f"{faults} violations"
        summary.append(f"CUDA check {folder.name}: {len(kernels)} kernels compiled, {verdict}")
    print("\n" + "\n".join(summary), flush=True)
    return 1 if bad else 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser("compile", help="one source for one architecture")
    build.add_argument("--nvcc", default="nvcc")
    build.add_argument("--architecture", required=True)
    build.add_argument("--output", type=Path, required=True)
    build.add_argument("source", type=Path)
    show = commands.add_parser("report", help="tables and verdict over compiled kernels")
    show.add_argument("--budgets", type=Path, required=True)
    show.add_argument("root", type=Path)
    args = parser.parse_args()
    if args.command == "compile":
        return compile_source(args.nvcc, args.architecture, args.source, args.output)
    return report(args.root, json.loads(args.budgets.read_text()))


if __name__ == "__main__":
    sys.exit(main())
