"""The two halves of every backward on Triton: dz and the entries of dS that peaks take (``logit_gradient``)
by rows, then dE and dbias by codes.

Both form S again, so that nothing is added from two programs: 6 products of 2·N·K·D for a selection, 5 for
the entropies (one for ``moments``), 7 for both; less where tiles are skipped (``live.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.library import wrap_triton

from ibq_fast.ops.triton import plan
from ibq_fast.ops.triton.kernels.code_gradient import code_gradient
from ibq_fast.ops.triton.kernels.finish_gradients import finish_code_gradient, finish_row_gradient
from ibq_fast.ops.triton.kernels.logit_gradient import ROW_SLOTS
from ibq_fast.ops.triton.kernels.row_gradient import row_gradient
from ibq_fast.ops.triton.launch import empty, precision, sizes
from ibq_fast.ops.triton.live import Live

FINISH_ROWS = 16
FINISH_COLUMNS = 256


@dataclass
class Group:
    """One source of dS. peak [N] int32: the code that a row's probability nearly all lies on, or -1; bound:
    gives a bound of |dS| [N], which only float16 needs; rows: its slots of what is known of a row."""

    peak: Tensor
    bound: Callable[[], Tensor]
    rows: tuple[Tensor, ...]


@dataclass
class Gradients:
    """What a backward is asked for. first: the selection's or the loss's part; second: the entropies'; live:
    the tiles that matter, None for all."""

    z: Tensor
    codebook: Tensor
    bias: Tensor | None
    scale: float
    first: Group | None = None
    second: Group | None = None
    grad_z_q: Tensor | None = None
    grad_codes: Tensor | None = None
    indices: Tensor | None = None
    targets: Tensor | None = None
    label_smoothing: float = 0.0
    temperature: float = 1.0
    c: Tensor | None = None
    norm_weight: float = 0.0
    live: Live | None = None

    def compute(self) -> tuple[Tensor, Tensor, Tensor]:
        """(grad_z, grad_codebook, sums of dS over rows [K] float32); N ≥ 1."""
        n = self.z.shape[0]
        one = self.z.new_ones(n, dtype=torch.float32)
        first = self.first.rows if self.first else (one, one)
        second = self.second.rows if self.second else (one,) * 5
        none = torch.full_like(one, -1, dtype=torch.int32)
        peaks = torch.stack([group.peak if group else none for group in (self.first, self.second)])
        boost = self._boost(one)
        data = torch.stack((*first, *second, one, one, boost))
        assert data.shape[0] == ROW_SLOTS.value
        part_z, rest = self._rows(data, peaks)
        data[7:9] = torch.where(peaks >= 0, -rest, 0.0)
        grad_z = self._finish_rows(part_z, data, peaks)
        del part_z
        least = boost.min().reshape(1)
        part_e, part_bias = self._codes(data, peaks, least)
        grad_bias = part_bias.sum(dim=0)
        return grad_z, self._finish_codes(part_e, least, grad_bias), grad_bias

    def _boost(self, one: Tensor) -> Tensor:
        """Powers of two that bring dS of float16 operands to 2^15 at the most: unscaled, the entries of a
        flat row over many codes would fall below 2^-24, the least that float16 holds."""
        if self.z.dtype != torch.float16:
            return one
        bound = sum(group.bound() for group in (self.first, self.second) if group)
        assert isinstance(bound, Tensor)
        return torch.exp2(torch.floor(15 - torch.log2(bound.clamp(2.0**-60, 2.0**60))))

    def _named(self, kernel: str) -> str:
        """The kernel's entry in the table of tiles."""
        return kernel if self.targets is None else f"loss_{kernel}"

    def _flags(self) -> dict[str, bool]:
        return {
            "SELECT": self.grad_z_q is not None,
            "ENTROPY": self.second is not None,
            "TARGET": self.targets is not None,
        }

    def _numbers(self) -> tuple[float, float, float, float]:
        """scale, 1/τ, and of the target distribution the target's own part and everyone's share."""
        e = self.label_smoothing
        return self.scale, 1.0 / self.temperature, 1.0 - e, e / self.codebook.shape[0]

    def _walk(self, tile: plan.Tile, over_codes: bool) -> Tensor | None:
        return None if self.live is None else self.live.walks(tile, over_codes)

    def _rows(self, data: Tensor, peaks: Tensor) -> tuple[Tensor, Tensor]:
        n, k, d = sizes(self.z, self.codebook)
        blocks = plan.blocks(self._named("row_gradient"), self.z)
        row_tiles = plan.ceil_div(n, blocks.tile.rows)
        splits, each = plan.splits(
            plan.ceil_div(k, blocks.tile.codes),
            row_tiles * blocks.chunks,
            blocks.tile.per_unit,
            self.z.device,
        )
        part_z, rest = empty(self.z, splits, n, d), self.z.new_zeros((splits, 2, n), dtype=torch.float32)
        walk = self._walk(blocks.tile, over_codes=True)
        wrap_triton(row_gradient)[(row_tiles * splits * blocks.chunks,)](
            self.z,
            self.codebook,
            data if self.bias is None else self.bias,
            self.z if self.grad_z_q is None else self.grad_z_q,
            peaks if self.targets is None else self.targets,
            data,
            peaks,
            data if self.c is None else self.c,
            part_z,
            rest,
            peaks if walk is None else walk,
            n,
            k,
            *self._numbers(),
            row_tiles,
            splits,
            each,
            **blocks.constants(
                D=d,
                OUT=blocks.out,
                BIAS=self.bias is not None,
                EVEN=k % blocks.tile.codes == 0,
                SKIP=walk is not None,
                PRECISION=precision(self.z),
                **self._flags(),
            ),
        )
        return part_z, rest.sum(dim=0)

    def _finish_rows(self, part_z: Tensor, data: Tensor, peaks: Tensor) -> Tensor:
        splits, (n, _, d) = part_z.shape[0], sizes(self.z, self.codebook)
        grad_z = torch.empty_like(self.z)
        tiles = plan.ceil_div(n, FINISH_ROWS)
        columns = min(FINISH_COLUMNS, plan.power_of_two(d))
        wrap_triton(finish_row_gradient)[(tiles * plan.ceil_div(d, columns),)](
            part_z,
            data,
            peaks,
            self.codebook,
            grad_z,
            n,
            self.scale,
            tiles,
            splits,
            D=d,
            ROWS=FINISH_ROWS,
            OUT=columns,
            FIRST=self.first is not None,
            ENTROPY=self.second is not None,
        )
        return grad_z

    def _codes(self, data: Tensor, peaks: Tensor, boost: Tensor) -> tuple[Tensor, Tensor]:
        n, k, d = sizes(self.z, self.codebook)
        blocks = plan.blocks(self._named("code_gradient"), self.z)
        code_tiles = plan.ceil_div(k, blocks.tile.codes)
        splits, each = plan.splits(
            plan.ceil_div(n, blocks.tile.rows),
            code_tiles * blocks.chunks,
            blocks.tile.per_unit,
            self.z.device,
        )
        part_e, part_bias = empty(self.z, splits, k, d), empty(self.z, splits, k)
        walk = self._walk(blocks.tile, over_codes=False)
        wrap_triton(code_gradient)[(code_tiles * splits * blocks.chunks,)](
            self.z,
            self.codebook,
            data if self.bias is None else self.bias,
            self.z if self.grad_z_q is None else self.grad_z_q,
            peaks if self.targets is None else self.targets,
            data,
            peaks,
            data if self.c is None else self.c,
            boost,
            part_e,
            part_bias,
            peaks if walk is None else walk,
            n,
            k,
            *self._numbers(),
            code_tiles,
            splits,
            each,
            **blocks.constants(
                D=d,
                OUT=blocks.out,
                BIAS=self.bias is not None,
                SKIP=walk is not None,
                PRECISION=precision(self.z),
                **self._flags(),
            ),
        )
        return part_e, part_bias

    def _finish_codes(self, part_e: Tensor, boost: Tensor, grad_bias: Tensor) -> Tensor:
        splits, (_, k, d) = part_e.shape[0], sizes(self.z, self.codebook)
        grad_codebook = torch.empty_like(self.codebook)
        hits = self.indices is not None
        if self.indices is not None:
            ordered, order = self.indices.sort(stable=True)
            starts = torch.searchsorted(ordered, torch.arange(k + 1, device=ordered.device))
        else:
            order = starts = grad_bias
        tiles = plan.ceil_div(k, FINISH_ROWS)
        columns = min(FINISH_COLUMNS, plan.power_of_two(d))
        wrap_triton(finish_code_gradient)[(tiles * plan.ceil_div(d, columns),)](
            part_e,
            boost,
            grad_bias,
            self.codebook,
            order,
            starts,
            order if self.indices is None else self.indices,
            part_e if self.grad_z_q is None else self.grad_z_q,
            part_e if self.grad_codes is None else self.grad_codes,
            grad_codebook,
            k,
            self.scale,
            self.norm_weight,
            tiles,
            splits,
            D=d,
            CODES=FINISH_ROWS,
            ROWS=FINISH_ROWS,
            OUT=columns,
            HITS=hits,
            NORMS=self.norm_weight != 0.0,
        )
        return grad_codebook
