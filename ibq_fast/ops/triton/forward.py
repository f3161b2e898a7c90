"""The forward operators on Triton: plans, workspace and launches. Contracts are in ``ibq_fast/ops``."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.library import wrap_triton

from ibq_fast.ops.blocks import bias_with_norms
from ibq_fast.ops.triton import plan
from ibq_fast.ops.triton.kernels.column_means import column_means
from ibq_fast.ops.triton.kernels.finish_rows import finish_rows
from ibq_fast.ops.triton.kernels.histogram import count_codes
from ibq_fast.ops.triton.kernels.row_sweep import SLOTS, row_sweep
from ibq_fast.ops.triton.launch import empty, operand, precision, sizes

FINISH_ROWS = 16
FINISH_COLUMNS = 256
COUNTED_ROWS = 256


class Swept(NamedTuple):
    """What a sweep over the rows gives: indices [N] int64, rows [5, N] float32 (see ``finish_rows``), readout
    [N, D] float32; those not asked for are unset memory."""

    indices: Tensor
    rows: Tensor
    readout: Tensor


def sweep(
    kernel: str,
    z: Tensor,
    codebook: Tensor,
    bias: Tensor | None,
    scale: float,
    *,
    temperature: float = 1.0,
    lse: bool = False,
    readout: bool = False,
    entropy: bool = False,
    targets: Tensor | None = None,
    ignore_index: int = 0,
    label_smoothing: float = 0.0,
) -> Swept:
    """One sweep with the statistics asked for; ``kernel`` names its entry in the table of tiles. N ≥ 1."""
    n, k, d = sizes(z, codebook)
    blocks = plan.blocks(kernel, z)
    tile, chunks = blocks.tile, blocks.chunks if readout else 1
    row_tiles = plan.ceil_div(n, tile.rows)
    code_tiles = plan.ceil_div(k, tile.codes)
    splits, each = plan.splits(code_tiles, row_tiles * chunks, tile.per_unit, z.device)
    wanted = {
        "LSE": lse,
        "READOUT": readout,
        "ENTROPY": entropy,
        "TARGET": targets is not None,
        "SMOOTH": label_smoothing > 0,
    }
    stats = empty(z, splits, SLOTS.value, n)
    part_index = empty(z, splits, n, dtype=torch.int32)
    part_readout = empty(z, splits, n, d) if readout else stats
    targets = part_index if targets is None else targets
    wrap_triton(row_sweep)[(row_tiles * splits * chunks,)](
        z,
        codebook,
        stats if bias is None else bias.contiguous(),
        targets,
        stats,
        part_index,
        part_readout,
        n,
        k,
        scale,
        1.0 / temperature,
        ignore_index,
        row_tiles,
        splits,
        each,
        **blocks.constants(
            D=d,
            OUT=blocks.out,
            BIAS=bias is not None,
            EVEN=k % tile.codes == 0,
            PRECISION=precision(z),
            **wanted,
        ),
    )
    out = Swept(empty(z, n, dtype=torch.int64), empty(z, 5, n), empty(z, n, d) if readout else part_readout)
    finish_tiles = plan.ceil_div(n, FINISH_ROWS)
    columns = min(FINISH_COLUMNS, plan.power_of_two(d))
    wrap_triton(finish_rows)[(finish_tiles * (plan.ceil_div(d, columns) if readout else 1),)](
        stats,
        part_index,
        part_readout,
        targets,
        out.indices,
        out.rows,
        out.readout,
        n,
        k,
        1.0 / temperature,
        ignore_index,
        label_smoothing,
        finish_tiles,
        splits,
        D=d,
        ROWS=FINISH_ROWS,
        OUT=columns,
        **wanted,
    )
    return out


def mean_probability(
    z: Tensor, codebook: Tensor, bias: Tensor | None, scale: float, temperature: float, rows: Tensor
) -> Tensor:
    """Mean over rows of softmax(S/τ) [K]; rows: as ``sweep`` left them."""
    n, k, d = sizes(z, codebook)
    blocks = plan.blocks("column_means", z)
    code_tiles = plan.ceil_div(k, blocks.tile.codes)
    splits, each = plan.splits(plan.ceil_div(n, blocks.tile.rows), code_tiles, blocks.tile.per_unit, z.device)
    sums = empty(z, splits, k)
    wrap_triton(column_means)[(code_tiles * splits,)](
        z,
        codebook,
        sums if bias is None else bias.contiguous(),
        torch.stack((rows[0], rows[4])),
        sums,
        n,
        k,
        scale,
        1.0 / temperature,
        code_tiles,
        each,
        **blocks.constants(D=d, BIAS=bias is not None, PRECISION=precision(z)),
    )
    return sums.sum(dim=0) / n


def codebook_search(
    z: Tensor, codebook: Tensor, bias: Tensor | None, scale: float, with_lse: bool, exact: bool
) -> tuple[Tensor, Tensor, Tensor]:
    z, codebook = operand(z), operand(codebook)
    if z.shape[0] == 0:
        return empty(z, 0, dtype=torch.int64), empty(z, 0), empty(z, 0)
    out = sweep("search", z, codebook, bias, scale, lse=with_lse)
    return out.indices, out.rows[0].clone(), out.rows[1].clone() if with_lse else empty(z, 0)


def straight_through_select(
    z: Tensor, codebook: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    z, codebook = operand(z), operand(codebook)
    if z.shape[0] == 0:
        return *_gathered(codebook, empty(z, 0, dtype=torch.int64)), empty(z, 0), empty(z, 0, z.shape[1])
    out = sweep("select", z, codebook, bias, scale, lse=True, readout=True)
    return *_gathered(codebook, out.indices), out.rows[1].clone(), out.readout


def softmax_statistics(
    z: Tensor, codebook: Tensor, bias: Tensor | None, scale: float, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    z, codebook = operand(z), operand(codebook)
    if z.shape[0] == 0:
        return empty(z, 0), z.new_zeros(codebook.shape[:1], dtype=torch.float32), empty(z, 0)
    rows = sweep("statistics", z, codebook, bias, scale, temperature=temperature, entropy=True).rows
    mean = mean_probability(z, codebook, bias, scale, temperature, rows)
    return rows[2].clone(), mean, rows[3].clone()


def index_backprop(
    z: Tensor, codebook: Tensor, bias: Tensor | None, scale: float, norm_weight: float, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    z, codebook = operand(z), operand(codebook)
    bias = bias_with_norms(codebook, bias, norm_weight)
    kept = empty(z, 2, 0, 0), z.new_empty(0, dtype=torch.uint8)
    if z.shape[0] == 0:
        selected = straight_through_select(z, codebook, bias, scale)
        return *selected, *softmax_statistics(z, codebook, bias, scale, temperature), *kept
    out = sweep(
        "joint", z, codebook, bias, scale, temperature=temperature, lse=True, readout=True, entropy=True
    )
    mean = mean_probability(z, codebook, bias, scale, temperature, out.rows)
    _, lse, row_entropy, lse_tau, _ = (row.clone() for row in out.rows)
    selected = (*_gathered(codebook, out.indices), lse, out.readout)
    return *selected, row_entropy, mean, lse_tau, *kept


def linear_cross_entropy(
    hidden: Tensor,
    head: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ignore_index: int,
    label_smoothing: float,
) -> tuple[Tensor, Tensor]:
    hidden, head = operand(hidden), operand(head)
    if hidden.shape[0] == 0:
        return empty(hidden, 0), empty(hidden, 0)
    rows = sweep(
        "cross_entropy",
        hidden,
        head,
        bias,
        1.0,
        lse=True,
        targets=targets.contiguous(),
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
    ).rows
    return rows[0].clone(), rows[1].clone()


def code_histogram(indices: Tensor, codebook_size: int) -> Tensor:
    indices = indices.contiguous()
    counts = indices.new_zeros((codebook_size,), dtype=torch.int32)
    n = indices.shape[0]
    if n > 0:
        grid = (plan.ceil_div(n, COUNTED_ROWS),)
        wrap_triton(count_codes)[grid](indices, counts, n, codebook_size, ROWS=COUNTED_ROWS)
    return counts.to(torch.int64)


def _gathered(codebook: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return codebook.index_select(0, index), codebook.index_select(0, index), index
