"""code_gradient: dE = dSᵀ z of a tile of codes, in a walk over the rows; the second half of the backward.

The transpose of ``row_gradient``: E stays on the chip, rows of z and g stream past. The tile lies codes ×
rows, so that dSᵀ is a left operand as it stands. Row ranges ("splits") leave their sums apart. Cost as
there.
"""

import triton
import triton.language as tl

from ibq_fast.ops.triton.kernels.device import load_tile, product, walk_of
from ibq_fast.ops.triton.kernels.logit_gradient import (
    AMOUNT,
    AMOUNT_TAU,
    CENTER,
    DELTA,
    LOG_TOTAL,
    LSE,
    MEAN_C,
    MEAN_Y,
    SLOPE,
    entropies,
    loss,
    row_value,
    selection,
)


@triton.jit
def code_gradient(
    z,
    e,
    bias,
    g,
    targets,
    data,
    peaks,
    c,
    boost,
    part_e,
    part_bias,
    walk,
    n,
    k,
    scale,
    inverse_tau,
    hit,
    share,
    code_tiles,
    splits,
    tiles_per_split,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    CODES: tl.constexpr,
    DEPTH: tl.constexpr,
    OUT: tl.constexpr,
    WHOLE: tl.constexpr,
    BIAS: tl.constexpr,
    SELECT: tl.constexpr,
    ENTROPY: tl.constexpr,
    TARGET: tl.constexpr,
    SKIP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Operands of ``row_gradient`` with the peaks' amounts in data, boost [1] -> part_e [splits, K, D]
    float32 without scale and with boost, part_bias [splits, K]: sums of dS over rows."""
    pid = tl.program_id(0)
    split = (pid // code_tiles) % splits
    chunk = pid // (code_tiles * splits)
    lines = (pid % code_tiles) * CODES + tl.arange(0, CODES)
    known = lines < k
    codes_at = lines.to(tl.int64)
    codes = lines[:, None]
    half: tl.constexpr = z.dtype.element_ty == tl.float16

    if WHOLE:
        e_tile = load_tile(e, codes_at, known, 0, D, DEPTH)
    if BIAS:
        shift = tl.load(bias + lines, mask=known, other=0.0)[:, None]
    if ENTROPY:
        weights = tl.load(c + lines, mask=known, other=0.0)[:, None]
    if half:
        factor = tl.load(boost)
    out = tl.zeros([CODES, OUT], tl.float32)
    total = tl.zeros([CODES], tl.float32)
    first, last = walk_of(walk, pid % code_tiles, tl.cdiv(n, ROWS), split, splits, tiles_per_split, SKIP)
    for step in range(first, last):
        tile = tl.load(walk + step) if SKIP else step
        rows = tile * ROWS + tl.arange(0, ROWS)
        inside = rows < n
        rows_at = rows.to(tl.int64)
        loaded = inside
        if SELECT or TARGET:
            lse = row_value(data, n, rows, inside, LSE, float("inf"))
            if TARGET:
                loaded = inside & (lse != float("inf"))
                target = tl.load(targets + rows, mask=inside, other=0)[None, :]
            lse = lse[None, :]
            delta = row_value(data, n, rows, inside, DELTA, 0.0)[None, :]
            amount = row_value(data, n, rows, inside, AMOUNT, 0.0)[None, :]
            peak = tl.load(peaks + rows, mask=inside, other=-1)[None, :]
        if WHOLE:
            z_tile = load_tile(z, rows_at, loaded, 0, D, DEPTH)
            s = tl.dot(e_tile, tl.trans(z_tile), input_precision=PRECISION) * scale
            if SELECT:
                g_tile = load_tile(g, rows_at, inside, 0, D, DEPTH)
                dots = tl.dot(e_tile, tl.trans(g_tile), input_precision=PRECISION)
        else:
            s = product(e, codes_at, known, z, rows_at, loaded, D, DEPTH, CODES, ROWS, PRECISION) * scale
            if SELECT:
                dots = product(e, codes_at, known, g, rows_at, inside, D, DEPTH, CODES, ROWS, PRECISION)
        if BIAS:
            s += shift
        if SELECT:
            ds = selection(s, dots, codes, lse, delta, peak, amount)
        if TARGET:
            ds = loss(s, codes, inside[None, :], lse, delta, target, hit, share, peak, amount)
        if ENTROPY:
            center = row_value(data, n, rows, inside, CENTER, 0.0)[None, :]
            log_total = row_value(data, n, rows, inside, LOG_TOTAL, float("inf"))[None, :]
            mean_y = row_value(data, n, rows, inside, MEAN_Y, 0.0)[None, :]
            slope = row_value(data, n, rows, inside, SLOPE, 0.0)[None, :]
            mean_c = row_value(data, n, rows, inside, MEAN_C, 0.0)[None, :]
            amount_tau = row_value(data, n, rows, inside, AMOUNT_TAU, 0.0)[None, :]
            peak_tau = tl.load(peaks + n + rows, mask=inside, other=-1)[None, :]
            more = entropies(
                s,
                weights,
                codes,
                inverse_tau,
                center,
                log_total,
                mean_y,
                slope,
                mean_c,
                peak_tau,
                amount_tau,
            )
            ds = ds + more if SELECT else more
        total += tl.sum(ds, axis=1)
        if half:
            ds *= factor
        if not WHOLE:
            z_tile = load_tile(z, rows_at, loaded, chunk * OUT, D, OUT)
        out = tl.dot(ds.to(z_tile.dtype), z_tile, out, input_precision=PRECISION)

    depths = chunk * OUT + tl.arange(0, OUT)
    into = part_e + (split * k + codes_at[:, None]) * D + depths[None, :]
    tl.store(into, out, mask=known[:, None] & (depths < D)[None, :])
    tl.store(part_bias + split * k + lines, total, mask=known & (chunk == 0))
