"""Measures tiles on the GPU at hand and rewrites the table: ``python -m ibq_fast.ops.triton.tune``.

For each entry of the table it times the operator that the entry serves with every candidate tile, at N = K =
16,384 (``--rows``, ``--codes``), and keeps the fastest. A candidate counts only if the operator's results
with it agree with those of the composite operator; one that the device has too little shared memory or
registers for is passed over. The table's ``measured`` then names the device, the date and Triton. Compiling
takes most of the time: some 70 candidates an entry, a second or two each. Never run on a GPU so far.
"""

# ruff: noqa: T201 (progress on standard output is for whoever waits for it)
from __future__ import annotations

import argparse
import datetime
import functools
import itertools
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ibq_fast.ops.triton import NAMESPACE, UNAVAILABLE, plan

# An entry's D: the widest row that "whole" tiles hold, and one that they do not.
DIMENSIONS = {"2": 256, "2 wide": 1024, "4": 64, "4 wide": 256}
DTYPES = {2: torch.bfloat16, 4: torch.float32}
TOLERANCE = {2: 2e-2, 4: 1e-4}

Call = Callable[[Any], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Problem:
    """Operands at which an entry is measured."""

    z: Tensor
    codebook: Tensor
    grad: Tensor
    targets: Tensor

    @classmethod
    def draw(cls, rows: int, codes: int, dimension: int, dtype: torch.dtype, device: str) -> Problem:
        generator = torch.Generator(device).manual_seed(0)

        def normal(n: int) -> Tensor:
            return torch.randn(n, dimension, generator=generator, device=device).to(dtype)

        targets = torch.randint(codes, (rows,), generator=generator, device=device)
        return cls(normal(rows), normal(codes) / dimension**0.5, normal(rows), targets)


def calls(x: Problem) -> dict[str, Call]:
    """What to time for each entry, as a function of a namespace of operators."""
    saved: dict[str, Any] = {}

    def joint_backward(ops: Any) -> tuple[Tensor, ...]:
        if "joint" not in saved:
            saved["joint"] = ops.index_backprop(x.z, x.codebook, None, 1.0, 0.0, 0.1)
        _, _, indices, lse, readout, row_entropy, mean_prob, lse_tau, *unused = saved["joint"]
        incoming = x.grad, x.grad, torch.ones_like(row_entropy), mean_prob
        kept = indices, lse, readout, row_entropy, lse_tau, *unused
        return ops.index_backprop_backward(*incoming, x.z, x.codebook, None, 1.0, 0.0, 0.1, *kept)

    def loss_backward(ops: Any) -> tuple[Tensor, ...]:
        if "lse" not in saved:
            saved["lse"] = loss(ops)[1]
        ones = torch.ones_like(saved["lse"])
        return ops.linear_cross_entropy_backward(
            ones, x.z, x.codebook, None, x.targets, -1, 0.0, saved["lse"]
        )

    def loss(ops: Any) -> tuple[Tensor, ...]:
        return ops.linear_cross_entropy(x.z, x.codebook, None, x.targets, -1, 0.0)

    def statistics(ops: Any) -> tuple[Tensor, ...]:
        return ops.softmax_statistics(x.z, x.codebook, None, 1.0, 0.1)

    return {
        "search": lambda ops: ops.codebook_search(x.z, x.codebook, None, 1.0, False, False)[1:2],
        "select": lambda ops: ops.straight_through_select(x.z, x.codebook, None, 1.0)[3:],
        "statistics": statistics,
        "column_means": statistics,
        "joint": lambda ops: ops.index_backprop(x.z, x.codebook, None, 1.0, 0.0, 0.1)[3:8],
        "moments": joint_backward,
        "row_gradient": joint_backward,
        "code_gradient": joint_backward,
        "cross_entropy": loss,
        "loss_row_gradient": loss_backward,
        "loss_code_gradient": loss_backward,
    }


def candidates(key: str) -> list[plan.Tile]:
    """Tiles worth trying for an entry ``"2"``, ``"2 wide"``, ``"4"`` or ``"4 wide"``."""
    half, wide = key.startswith("2"), key.endswith("wide")
    rows, codes = ((64, 128, 256), (32, 64, 128)) if half else ((32, 64, 128), (32, 64))
    depths = ((64, 128) if half else (32, 64)) if wide else ((256,) if half else (64, 128))
    outs = (128, 256) if wide else (256,)
    sides = {*itertools.product(rows, codes), *itertools.product(codes, rows)}
    return [
        plan.Tile(*side, depth, out, warps, stages, per_unit)
        for side, depth, out, warps, stages, per_unit in itertools.product(
            sorted(sides), depths, outs, (4, 8), (2, 3), (1, 2)
        )
    ]


def agrees(ours: Iterable[Tensor], theirs: Iterable[Tensor], tolerance: float) -> bool:
    """Whether ‖ours - theirs‖ ≤ tolerance · ‖theirs‖ for every result; NaN never agrees."""
    return all(
        bool((a.double() - b.double()).norm() <= tolerance * b.double().norm().clamp_min(1e-30))
        for a, b in zip(ours, theirs, strict=True)
        if b.numel()
    )


def best(
    entry: dict[str, Any],
    tiles: Iterable[plan.Tile],
    run: Callable[[], tuple[Tensor, ...]],
    truth: tuple[Tensor, ...],
    tolerance: float,
    clock: Callable[[Callable[[], Any]], float],
    impossible: tuple[type[Exception], ...],
) -> tuple[plan.Tile, float]:
    """The fastest of the tiles whose results agree, put into ``entry`` one after the other; and its time."""
    found: tuple[plan.Tile, float] | None = None
    for tile in tiles:
        entry.clear()
        entry.update(asdict(tile))
        try:
            right = agrees(run(), truth, tolerance)
        except impossible:
            continue
        if right:
            time = clock(run)
            if found is None or time < found[1]:
                found = tile, time
    if found is None:
        raise RuntimeError("tune: expected at least one candidate tile that fits and agrees, got none")
    entry.clear()
    entry.update(asdict(found[0]))
    return found


def dump(table: dict[str, Any]) -> str:
    """The table as text, an entry a line."""
    parts = []
    for name, part in table.items():
        kernels = ",\n".join(
            f'      "{kernel}": {{\n'
            + ",\n".join(f'        "{key}": {json.dumps(tile)}' for key, tile in entries.items())
            + "\n      }"
            for kernel, entries in part["kernels"].items()
        )
        head = f'  "{name}": {{\n    "measured": {json.dumps(part["measured"])},\n    "kernels": {{\n'
        parts.append(head + kernels + "\n    }\n  }")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=16384)
    parser.add_argument("--codes", type=int, default=16384)
    parser.add_argument("--kernel", action="append", choices=plan.KERNELS, help="default: all of them")
    parser.add_argument("--table", type=Path, default=plan.TABLE)
    args = parser.parse_args()
    if UNAVAILABLE is not None:
        parser.error(UNAVAILABLE)
    if not torch.cuda.is_available():
        parser.error("tiles are measured on a GPU, and PyTorch sees none here")
    tune(args.table, args.rows, args.codes, args.kernel or plan.KERNELS)


def tune(path: Path, rows: int, codes: int, kernels: Iterable[str]) -> None:
    """Measure the entries of ``kernels`` on the current GPU and write the table to ``path``."""
    import triton
    from triton.compiler import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    table = plan.load_table()
    architecture = plan.architecture(torch.device("cuda", torch.cuda.current_device()))
    ours, theirs = getattr(torch.ops, NAMESPACE), torch.ops.ibq_fast_composite
    clock = functools.partial(triton.testing.do_bench, return_mode="median")
    impossible = (OutOfResources, CompilationError, PTXASError)
    for key, dimension in DIMENSIONS.items():
        width = int(key.split()[0])
        problem = Problem.draw(rows, codes, dimension, DTYPES[width], "cuda")
        for kernel in kernels:
            call, truth = calls(problem)[kernel], calls(problem)[kernel](theirs)
            entry = table[architecture]["kernels"][kernel][key]
            run = functools.partial(call, ours)
            tile, time = best(entry, candidates(key), run, truth, TOLERANCE[width], clock, impossible)
            print(f"{architecture} {kernel} {key}: {time:.3f} ms with {tile}", flush=True)
            table[architecture]["measured"] = (
                f"{torch.cuda.get_device_name()}, {datetime.date.today()}, triton {triton.__version__}, "
                f"N = {rows}, K = {codes}"
            )
            path.write_text(dump(table))


if __name__ == "__main__":
    main()
