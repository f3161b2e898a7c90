"""Block sizes from the committed table, and how a kernel's work is cut over the device.

``tiles.json`` holds, for each architecture, one entry a kernel, operand width in bytes and depth: "whole"
where a row of D ≤ ``depth`` numbers is held at once, "wide" above, where ``depth`` is the step. ``python -m
ibq_fast.ops.triton.tune`` measures on a GPU and rewrites it; ``measured`` says on what, or that it was not.
"""

from __future__ import annotations

import functools
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TABLE = Path(__file__).with_name("tiles.json")
INTERPRETER = "interpreter"
NOT_MEASURED = "not yet measured on a GPU"

KERNELS = (
    "search",
    "select",
    "statistics",
    "joint",
    "cross_entropy",
    "column_means",
    "moments",
    "row_gradient",
    "code_gradient",
    "loss_row_gradient",
    "loss_code_gradient",
)


@dataclass(frozen=True)
class Tile:
    """rows × codes of a program's tile; depth: see the module; out: columns of D that a program of a "wide"
    kernel accumulates; warps, stages: as Triton takes them; per_unit: programs that run at once on a
    multiprocessor."""

    rows: int
    codes: int
    depth: int
    out: int
    warps: int
    stages: int
    per_unit: int = 1

    def __post_init__(self) -> None:
        for name in ("rows", "codes", "depth", "out"):
            value = getattr(self, name)
            if value < 16 or value & (value - 1):
                raise ValueError(f"{name}: expected a power of two from 16 on, got {value}")
        if min(self.warps, self.stages, self.per_unit) < 1:
            raise ValueError(f"warps, stages, per_unit: expected at least 1, got {asdict(self)}")


@dataclass(frozen=True)
class Blocks:
    """A tile fitted to D: the constants a kernel is compiled with."""

    tile: Tile
    whole: bool
    depth: int
    out: int
    chunks: int

    def constants(self, **more: Any) -> dict[str, Any]:
        """Keyword arguments of a kernel: ROWS, CODES, DEPTH, WHOLE, num_warps, num_stages and ``more``."""
        return {
            "ROWS": self.tile.rows,
            "CODES": self.tile.codes,
            "DEPTH": self.depth,
            "WHOLE": self.whole,
            **more,
            "num_warps": self.tile.warps,
            "num_stages": self.tile.stages,
        }


@functools.cache
def load_table(path: Path = TABLE) -> dict[str, Any]:
    return json.loads(path.read_text())


def entry(architecture: str, kernel: str, width: int, wide: bool) -> Tile:
    """The table's tile for operands of ``width`` bytes; ValueError where the table has none."""
    table = load_table()
    key = f"{width} wide" if wide else str(width)
    try:
        return Tile(**table[architecture]["kernels"][kernel][key])
    except KeyError as error:
        raise ValueError(f"tiles.json: expected an entry {architecture}/{kernel}/{key}, got none") from error


def fit(architecture: str, kernel: str, width: int, dimension: int) -> Blocks:
    """The tile of a kernel for rows of ``dimension`` numbers."""
    tile = entry(architecture, kernel, width, wide=False)
    if dimension <= tile.depth:
        depth = power_of_two(dimension)
        return Blocks(tile, True, depth, depth, 1)
    tile = entry(architecture, kernel, width, wide=True)
    out = min(tile.out, power_of_two(dimension))
    return Blocks(tile, False, tile.depth, out, ceil_div(dimension, out))


def blocks(kernel: str, z: Tensor) -> Blocks:
    """The tile of a kernel for operands like z [N, D] on z's device."""
    return fit(architecture(z.device), kernel, z.element_size(), int(z.shape[1]))


def splits(tiles: Any, others: Any, per_unit: int, device: torch.device) -> tuple[Any, Any]:
    """How many ranges to cut ``tiles`` into, and the tiles of one, when ``others`` programs exist anyway.

    Two waves of programs at the most are split for: ranges cost statistics to write and join. Plain sums and
    quotients, so that symbolic sizes go through.
    """
    wanted = ceil_div(2 * per_unit * units(device), others)
    each = ceil_div(tiles, torch.sym_max(1, torch.sym_min(wanted, tiles)))
    return ceil_div(tiles, each), each


def ceil_div(a: Any, b: Any) -> Any:
    return (a + b - 1) // b


def power_of_two(value: int) -> int:
    """The least power of two that holds ``value``, and 16, the least side of a matrix product, at least."""
    return max(16, 1 << (value - 1).bit_length())


@functools.cache
def architecture(device: torch.device) -> str:
    """The table's name for a device. ValueError for one that it has no tiles for."""
    if device.type == "cpu":
        return INTERPRETER
    if device.type == "npu":
        return "npu"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) in ((8, 0), (8, 7)):
        return "sm_80"
    if major in (9, 10):
        return f"sm_{major}0"
    raise ValueError(f"device: expected compute capability 8.0, 9.0 or 10.x, got {major}.{minor}")


@functools.cache
def units(device: torch.device) -> int:
    """Multiprocessors of a GPU, matrix cores of an NPU, 2 for the interpreter (so that tests split)."""
    if device.type == "cpu":
        return 2
    if device.type == "npu":
        from triton.runtime import driver

        return int(driver.active.utils.get_device_properties(device.index or 0)["num_aicore"])
    return torch.cuda.get_device_properties(device).multi_processor_count
