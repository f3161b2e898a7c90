"""moments: what the entropies' gradient needs of whole rows first.

With y = (S - center)/τ and p = exp(y - H), all sums over codes: Σ p, Σ p c, Σ p y, and the maximum of S
with its lowest code. Σ p is 1 up to the rounding of center and H, which the caller takes out again.
Programs and splits as in ``row_sweep``. Cost: 2·N·K·D.
"""

import triton
import triton.language as tl

from ibq_fast.ops.triton.kernels.device import NO_CODE, cut, load_tile, product, walk_of

MOMENTS = tl.constexpr(4)  # Σ p, Σ p c, Σ p y, max S


@triton.jit
def moments(
    z,
    e,
    bias,
    c,
    center,
    entropy,
    sums,
    index,
    walk,
    n,
    k,
    scale,
    inverse_tau,
    row_tiles,
    splits,
    tiles_per_split,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    CODES: tl.constexpr,
    DEPTH: tl.constexpr,
    WHOLE: tl.constexpr,
    BIAS: tl.constexpr,
    EVEN: tl.constexpr,
    SKIP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """z [N, D], e [K, D], bias [K], c [K], center [N], entropy [N], walk -> sums [splits, MOMENTS, N], index
    [splits, N]."""
    pid = tl.program_id(0)
    split = pid // row_tiles
    rows = (pid % row_tiles) * ROWS + tl.arange(0, ROWS)
    inside = rows < n
    rows_at = rows.to(tl.int64)
    if WHOLE:
        z_tile = load_tile(z, rows_at, inside, 0, D, DEPTH)
    middle = tl.load(center + rows, mask=inside, other=0.0)
    height = tl.load(entropy + rows, mask=inside, other=0.0)
    total = tl.zeros([ROWS], tl.float32)
    sum_c = tl.zeros([ROWS], tl.float32)
    sum_y = tl.zeros([ROWS], tl.float32)
    best = tl.full([ROWS], float("-inf"), tl.float32)
    at = tl.zeros([ROWS], tl.int32)
    first, last = walk_of(walk, pid % row_tiles, tl.cdiv(k, CODES), split, splits, tiles_per_split, SKIP)
    for step in range(first, last):
        tile = tl.load(walk + step) if SKIP else step
        codes = tile * CODES + tl.arange(0, CODES)
        known = codes < k
        codes_at = codes.to(tl.int64)
        if WHOLE:
            e_tile = load_tile(e, codes_at, known, 0, D, DEPTH)
            s = tl.dot(z_tile, tl.trans(e_tile), input_precision=PRECISION) * scale
        else:
            s = product(z, rows_at, inside, e, codes_at, known, D, DEPTH, ROWS, CODES, PRECISION) * scale
        if BIAS:
            s += tl.load(bias + codes, mask=known, other=0.0)[None, :]
        if not EVEN:
            s = tl.where(known[None, :], s, float("-inf"))
        top = tl.max(s, axis=1)
        lowest = tl.min(tl.where(s == top[:, None], codes[None, :], NO_CODE), axis=1)
        at = tl.where(top > best, lowest, at)
        best = tl.maximum(best, top)
        y = cut((s - middle[:, None]) * inverse_tau)
        p = tl.exp(y - height[:, None])
        total += tl.sum(p, axis=1)
        sum_c += tl.sum(p * tl.load(c + codes, mask=known, other=0.0)[None, :], axis=1)
        sum_y += tl.sum(p * y, axis=1)
    part = sums + split * MOMENTS * n + rows
    tl.store(part, total, mask=inside)
    tl.store(part + n, sum_c, mask=inside)
    tl.store(part + 2 * n, sum_y, mask=inside)
    tl.store(part + 3 * n, best, mask=inside)
    tl.store(index + split * n + rows, at, mask=inside)
