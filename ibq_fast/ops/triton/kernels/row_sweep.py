"""row_sweep: one walk over the codes for a tile of rows, and everything a forward reduces from its logits.

Computes, for S = scale · z Eᵀ + bias in tiles that never leave the chip,

- the maximum of each row and the lowest code that has it,
- LSE: Σ exp(S - max); READOUT: Σ exp(S - max) E besides, rescaled when the maximum grows,
- ENTROPY: the same sum of S/τ, and Σ exp(-b) b with b = (max - S)/τ ≥ 0, free of cancellation,
- TARGET: the logit of each row's target; SMOOTH: Σ S.

A program owns (row tile, range of codes, range of output columns). Ranges of codes ("splits") fill the device
where there are few rows; ``finish_rows`` joins their partial statistics in code order, so nothing is added
atomically and results repeat to the bit. Cost: 2·N·K·D, twice that with READOUT; above ``depth`` dimensions S
is formed again for every OUT columns of the readout. z stays on the chip while tiles of E stream past.

The maximum ignores NaN; NaN is found in the sum of exponentials or, in a plain search, in the plain sum of
the logits (one addition an element; a row that holds both infinities counts as NaN).
"""

import triton
import triton.language as tl

from ibq_fast.ops.triton.kernels.device import FAR, LOWEST, NO_CODE, WEIGHT_BOOST, load_tile, product

# Slots of the partial statistics [splits, SLOTS, N].
SLOTS = tl.constexpr(5)
BEST = tl.constexpr(0)
TOTAL = tl.constexpr(1)  # a plain search keeps Σ S here
TOTAL_TAU = tl.constexpr(2)
SPREAD = tl.constexpr(3)  # SMOOTH keeps Σ S here
OWN = tl.constexpr(4)


@triton.jit
def row_sweep(
    z,
    e,
    bias,
    targets,
    stats,
    index,
    readout,
    n,
    k,
    scale,
    inverse_tau,
    ignored,
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
    LSE: tl.constexpr,
    READOUT: tl.constexpr,
    ENTROPY: tl.constexpr,
    TARGET: tl.constexpr,
    SMOOTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """z [N, D], e [K, D], bias [K], targets [N] -> stats [splits, SLOTS, N], index [splits, N] int32,
    readout [splits, N, D] float32."""
    pid = tl.program_id(0)
    split = (pid // row_tiles) % splits
    chunk = pid // (row_tiles * splits)
    rows = (pid % row_tiles) * ROWS + tl.arange(0, ROWS)
    inside = rows < n
    rows_at = rows.to(tl.int64)
    loaded = inside
    if TARGET:
        target = tl.load(targets + rows, mask=inside, other=-1)
        loaded = inside & (target != ignored)
    if WHOLE:
        z_tile = load_tile(z, rows_at, loaded, 0, D, DEPTH)
    boost = WEIGHT_BOOST if e.dtype.element_ty == tl.float16 else 1.0

    best = tl.full([ROWS], float("-inf"), tl.float32)
    at = tl.zeros([ROWS], tl.int32)
    total = tl.zeros([ROWS], tl.float32)
    total_tau = tl.zeros([ROWS], tl.float32)
    spread = tl.zeros([ROWS], tl.float32)
    own = tl.zeros([ROWS], tl.float32)
    if READOUT:
        gathered = tl.zeros([ROWS, OUT], tl.float32)

    first = split * tiles_per_split
    last = tl.minimum(first + tiles_per_split, tl.cdiv(k, CODES))
    for tile in range(first, last):
        codes = tile * CODES + tl.arange(0, CODES)
        known = codes < k
        codes_at = codes.to(tl.int64)
        if WHOLE:
            e_tile = load_tile(e, codes_at, known, 0, D, DEPTH)
            s = tl.dot(z_tile, tl.trans(e_tile), input_precision=PRECISION) * scale
        else:
            s = product(z, rows_at, loaded, e, codes_at, known, D, DEPTH, ROWS, CODES, PRECISION) * scale
        if BIAS:
            s += tl.load(bias + codes, mask=known, other=0.0)[None, :]
        if TARGET:
            own += tl.sum(tl.where(codes[None, :] == target[:, None], s, 0.0), axis=1)
        if SMOOTH:
            spread += tl.sum(s, axis=1)
        if not (LSE or ENTROPY):
            total += tl.sum(s, axis=1)
        if not EVEN:
            s = tl.where(known[None, :], s, float("-inf"))

        top = tl.max(s, axis=1)
        if not TARGET:
            lowest = tl.min(tl.where(s == top[:, None], codes[None, :], NO_CODE), axis=1)
            at = tl.where(top > best, lowest, at)
        new = tl.maximum(best, top)
        shift = tl.maximum(new, LOWEST)
        if LSE:
            weight = tl.exp(s - shift[:, None])
            shrink = tl.exp(best - shift)
            total = total * shrink + tl.sum(weight, axis=1)
            if READOUT:
                gathered *= shrink[:, None]
                if not WHOLE:
                    e_tile = load_tile(e, codes_at, known, chunk * OUT, D, OUT)
                gathered = tl.dot(
                    (weight * boost).to(e_tile.dtype), e_tile, gathered, input_precision=PRECISION
                )
        if ENTROPY:
            below = (shift[:, None] - s) * inverse_tau
            below = tl.where(below > FAR, FAR, below)
            growth = (shift - best) * inverse_tau
            growth = tl.where(growth > FAR, FAR, growth)
            weight_tau = tl.exp(-below)
            shrink_tau = tl.exp(-growth)
            spread = shrink_tau * (spread + growth * total_tau) + tl.sum(below * weight_tau, axis=1)
            total_tau = shrink_tau * total_tau + tl.sum(weight_tau, axis=1)
        best = new

    part = stats + split * SLOTS * n + rows
    if READOUT:
        columns = chunk * OUT + tl.arange(0, OUT)
        into = readout + (split * n + rows_at[:, None]) * D + columns[None, :]
        tl.store(into, gathered / boost, mask=inside[:, None] & (columns < D)[None, :])
        inside = inside & (chunk == 0)
    tl.store(part + BEST * n, best, mask=inside)
    tl.store(part + TOTAL * n, total, mask=inside)
    if not TARGET:
        tl.store(index + split * n + rows, at, mask=inside)
    if ENTROPY:
        tl.store(part + TOTAL_TAU * n, total_tau, mask=inside)
    if ENTROPY or SMOOTH:
        tl.store(part + SPREAD * n, spread, mask=inside)
    if TARGET:
        tl.store(part + OWN * n, own, mask=inside)
