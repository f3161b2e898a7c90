"""column_means: column sums of softmax(S/τ), given each row's maximum and log Σ exp((S - max)/τ).

BOUND: the greatest log-probability of each tile besides, under softmax(S) and under softmax(S/τ); infinite in
a tile with a NaN.

A program owns a tile of codes and a range of rows; E stays on the chip while rows stream past. Partial sums
of row ranges are left apart, [splits, K], and added up in order by the caller. Cost: 2·N·K·D.
"""

import triton
import triton.language as tl

from ibq_fast.ops.triton.kernels.device import cut, load_tile, product


@triton.jit
def greatest(values, known):
    """The maximum over the codes that there are, infinite where one is NaN."""
    values = tl.where(values != values, float("inf"), values)
    return tl.max(tl.where(known, tl.max(values, axis=1), float("-inf")), axis=0)


@triton.jit
def column_means(
    z,
    e,
    bias,
    rows_data,
    sums,
    bounds,
    n,
    k,
    scale,
    inverse_tau,
    code_tiles,
    row_tiles,
    tiles_per_split,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    CODES: tl.constexpr,
    DEPTH: tl.constexpr,
    WHOLE: tl.constexpr,
    BIAS: tl.constexpr,
    BOUND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """z [N, D], e [K, D], bias [K], rows_data [3, N]: maximum, log Σ, lse -> sums [splits, K],
    bounds [2, row tiles, code tiles], float32."""
    pid = tl.program_id(0)
    split = pid // code_tiles
    codes = (pid % code_tiles) * CODES + tl.arange(0, CODES)
    known = codes < k
    codes_at = codes.to(tl.int64)
    if WHOLE:
        e_tile = load_tile(e, codes_at, known, 0, D, DEPTH)
    if BIAS:
        shift = tl.load(bias + codes, mask=known, other=0.0)
    total = tl.zeros([CODES], tl.float32)
    first = split * tiles_per_split
    last = tl.minimum(first + tiles_per_split, tl.cdiv(n, ROWS))
    for tile in range(first, last):
        rows = tile * ROWS + tl.arange(0, ROWS)
        inside = rows < n
        rows_at = rows.to(tl.int64)
        best = tl.load(rows_data + rows, mask=inside, other=0.0)
        log_total = tl.load(rows_data + n + rows, mask=inside, other=float("inf"))
        if WHOLE:
            z_tile = load_tile(z, rows_at, inside, 0, D, DEPTH)
            s = tl.dot(e_tile, tl.trans(z_tile), input_precision=PRECISION) * scale
        else:
            s = product(e, codes_at, known, z, rows_at, inside, D, DEPTH, CODES, ROWS, PRECISION) * scale
        if BIAS:
            s += shift[:, None]
        # Two subtractions: the rounding of max/τ + log(total) would be a relative error of p.
        log_p = cut((s - best[None, :]) * inverse_tau) - log_total[None, :]
        total += tl.sum(tl.exp(log_p), axis=1)
        if BOUND:
            lse = tl.load(rows_data + 2 * n + rows, mask=inside, other=float("inf"))
            at = bounds + tile * code_tiles + pid % code_tiles
            tl.store(at, greatest(s - lse[None, :], known))
            tl.store(at + row_tiles * code_tiles, greatest(log_p, known))
    tl.store(sums + split * k + codes, total, mask=known)
