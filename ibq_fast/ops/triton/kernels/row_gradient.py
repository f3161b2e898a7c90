"""row_gradient: dz = dS E of a tile of rows, in a walk over the codes; the first half of the backward.

S, and g Eᵀ where there is a selection, are formed again in tiles, turned into dS and spent at once. z and g
stay on the chip, E streams past once for all three products; with SKIP its live tiles alone. dE is the other
half's (``code_gradient``): nothing is shared between programs, so nothing is added atomically. Cost in
2·N·K·D: 2, with a selection 3; above ``depth`` dimensions the logits are formed again for every OUT columns
of dz.
"""

import triton
import triton.language as tl

from ibq_fast.ops.triton.kernels.device import load_tile, product, walk_of
from ibq_fast.ops.triton.kernels.logit_gradient import (
    BOOST,
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
def row_gradient(
    z,
    e,
    bias,
    g,
    targets,
    data,
    peaks,
    c,
    part_z,
    rest,
    walk,
    n,
    k,
    scale,
    inverse_tau,
    hit,
    share,
    row_tiles,
    splits,
    tiles_per_split,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    CODES: tl.constexpr,
    DEPTH: tl.constexpr,
    OUT: tl.constexpr,
    WHOLE: tl.constexpr,
    BIAS: tl.constexpr,
    EVEN: tl.constexpr,
    SELECT: tl.constexpr,
    ENTROPY: tl.constexpr,
    TARGET: tl.constexpr,
    SKIP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """z, g [N, D], e [K, D], bias, c [K], targets [N], data [ROW_SLOTS, N], peaks [2, N] int32 -> part_z
    [splits, N, D] float32 without scale and peaks, rest [splits, 2, N]: sums of dS without the peaks."""
    pid = tl.program_id(0)
    split = (pid // row_tiles) % splits
    chunk = pid // (row_tiles * splits)
    rows = (pid % row_tiles) * ROWS + tl.arange(0, ROWS)
    inside = rows < n
    rows_at = rows.to(tl.int64)
    half: tl.constexpr = e.dtype.element_ty == tl.float16

    if SELECT or TARGET:
        lse = row_value(data, n, rows, inside, LSE, float("inf"))[:, None]
        delta = row_value(data, n, rows, inside, DELTA, 0.0)[:, None]
        peak = tl.load(peaks + rows, mask=inside, other=-1)[:, None]
        others = tl.zeros([ROWS], tl.float32)
    if ENTROPY:
        center = row_value(data, n, rows, inside, CENTER, 0.0)[:, None]
        log_total = row_value(data, n, rows, inside, LOG_TOTAL, float("inf"))[:, None]
        mean_y = row_value(data, n, rows, inside, MEAN_Y, 0.0)[:, None]
        slope = row_value(data, n, rows, inside, SLOPE, 0.0)[:, None]
        mean_c = row_value(data, n, rows, inside, MEAN_C, 0.0)[:, None]
        peak_tau = tl.load(peaks + n + rows, mask=inside, other=-1)[:, None]
        others_tau = tl.zeros([ROWS], tl.float32)
    if half:
        boost = row_value(data, n, rows, inside, BOOST, 1.0)[:, None]
    loaded = inside
    if TARGET:
        target = tl.load(targets + rows, mask=inside, other=0)[:, None]
        # A row that does not count has an infinite lse, and may hold anything.
        loaded = inside & (row_value(data, n, rows, inside, LSE, float("inf")) != float("inf"))
    if WHOLE:
        z_tile = load_tile(z, rows_at, loaded, 0, D, DEPTH)
        if SELECT:
            g_tile = load_tile(g, rows_at, inside, 0, D, DEPTH)

    out = tl.zeros([ROWS, OUT], tl.float32)
    first, last = walk_of(walk, pid % row_tiles, tl.cdiv(k, CODES), split, splits, tiles_per_split, SKIP)
    for step in range(first, last):
        tile = tl.load(walk + step) if SKIP else step
        columns = tile * CODES + tl.arange(0, CODES)
        known = columns < k
        codes_at = columns.to(tl.int64)
        codes = columns[None, :]
        if WHOLE:
            e_tile = load_tile(e, codes_at, known, 0, D, DEPTH)
            s = tl.dot(z_tile, tl.trans(e_tile), input_precision=PRECISION) * scale
            if SELECT:
                dots = tl.dot(g_tile, tl.trans(e_tile), input_precision=PRECISION)
        else:
            s = product(z, rows_at, loaded, e, codes_at, known, D, DEPTH, ROWS, CODES, PRECISION) * scale
            if SELECT:
                dots = product(g, rows_at, inside, e, codes_at, known, D, DEPTH, ROWS, CODES, PRECISION)
        if BIAS:
            s += tl.load(bias + columns, mask=known, other=0.0)[None, :]
        if not EVEN:
            s = tl.where(known[None, :], s, float("-inf"))
        if SELECT:
            ds = selection(s, dots, codes, lse, delta, peak, 0.0)
            others += tl.sum(ds, axis=1)
        if TARGET:
            ds = loss(s, codes, known[None, :], lse, delta, target, hit, share, peak, 0.0)
            others += tl.sum(ds, axis=1)
        if ENTROPY:
            weights = tl.load(c + columns, mask=known, other=0.0)[None, :]
            more = entropies(
                s, weights, codes, inverse_tau, center, log_total, mean_y, slope, mean_c, peak_tau, 0.0
            )
            others_tau += tl.sum(more, axis=1)
            ds = ds + more if SELECT else more
        if half:
            ds *= boost
        if not WHOLE:
            e_tile = load_tile(e, codes_at, known, chunk * OUT, D, OUT)
        out = tl.dot(ds.to(e_tile.dtype), e_tile, out, input_precision=PRECISION)

    depths = chunk * OUT + tl.arange(0, OUT)
    if half:
        out /= boost
    into = part_z + (split * n + rows_at[:, None]) * D + depths[None, :]
    tl.store(into, out, mask=inside[:, None] & (depths < D)[None, :])
    inside = inside & (chunk == 0)
    if SELECT or TARGET:
        tl.store(rest + split * 2 * n + rows, others, mask=inside)
    if ENTROPY:
        tl.store(rest + (split * 2 + 1) * n + rows, others_tau, mask=inside)
