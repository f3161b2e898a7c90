"""finish_rows: joins the partial statistics that the splits of ``row_sweep`` left, in code order.

Index ties go to the lowest code because an earlier split wins an equal maximum. A row that holds a NaN gives
index 0 and NaN everywhere else. Cost: splits · N · (SLOTS + D) numbers read once.
"""

import triton
import triton.language as tl

from ibq_fast.ops.triton.kernels.device import FAR, LOWEST
from ibq_fast.ops.triton.kernels.row_sweep import BEST, OWN, SLOTS, SPREAD, TOTAL, TOTAL_TAU


@triton.jit
def finish_rows(
    stats,
    index,
    readout,
    targets,
    out_index,
    out_rows,
    out_readout,
    n,
    k,
    inverse_tau,
    ignored,
    smoothing,
    row_tiles,
    splits,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    OUT: tl.constexpr,
    LSE: tl.constexpr,
    READOUT: tl.constexpr,
    ENTROPY: tl.constexpr,
    TARGET: tl.constexpr,
    SMOOTH: tl.constexpr,
):
    """-> out_index [N] int64, out_readout [N, D], and out_rows [5, N] float32: maximum, lse, entropy of the
    row, lse of S/τ, log Σ exp((S - max)/τ). With TARGET: loss and lse of rows that count, 0 of the
    others."""
    pid = tl.program_id(0)
    chunk = pid // row_tiles
    rows = (pid % row_tiles) * ROWS + tl.arange(0, ROWS)
    inside = rows < n
    rows_at = rows.to(tl.int64)

    best = tl.full([ROWS], float("-inf"), tl.float32)
    at = tl.zeros([ROWS], tl.int32)
    for split in range(splits):
        value = tl.load(stats + (split * SLOTS + BEST) * n + rows, mask=inside, other=0.0)
        if not TARGET:
            at = tl.where(value > best, tl.load(index + split * n + rows, mask=inside, other=0), at)
        best = tl.maximum(best, value)
    shift = tl.maximum(best, LOWEST)

    total = tl.zeros([ROWS], tl.float32)
    total_tau = tl.zeros([ROWS], tl.float32)
    spread = tl.zeros([ROWS], tl.float32)
    own = tl.zeros([ROWS], tl.float32)
    every = tl.zeros([ROWS], tl.float32)
    if READOUT:
        columns = chunk * OUT + tl.arange(0, OUT)
        wanted = inside[:, None] & (columns < D)[None, :]
        gathered = tl.zeros([ROWS, OUT], tl.float32)
    for split in range(splits):
        part = stats + split * SLOTS * n + rows
        value = tl.load(part + BEST * n, mask=inside, other=0.0)
        sum_here = tl.load(part + TOTAL * n, mask=inside, other=0.0)
        if LSE:
            shrink = tl.exp(value - shift)
            total += sum_here * shrink
            if READOUT:
                at_split = readout + (split * n + rows_at[:, None]) * D + columns[None, :]
                gathered += tl.load(at_split, mask=wanted, other=0.0) * shrink[:, None]
        else:
            total += sum_here
        if ENTROPY:
            growth = (shift - value) * inverse_tau
            growth = tl.where(growth > FAR, FAR, growth)
            shrink_tau = tl.exp(-growth)
            here = tl.load(part + TOTAL_TAU * n, mask=inside, other=0.0)
            spread += shrink_tau * (tl.load(part + SPREAD * n, mask=inside, other=0.0) + growth * here)
            total_tau += shrink_tau * here
        if SMOOTH:
            every += tl.load(part + SPREAD * n, mask=inside, other=0.0)
        if TARGET:
            own += tl.load(part + OWN * n, mask=inside, other=0.0)

    if READOUT:
        tl.store(
            out_readout + rows_at[:, None] * D + columns[None, :], gathered / total[:, None], mask=wanted
        )
        inside = inside & (chunk == 0)
    log_total = tl.log(total)
    log_tau = tl.log(total_tau)
    broken = (total_tau != total_tau) if ENTROPY else (total != total)
    out = out_rows + rows
    if TARGET:
        # Differences from the maximum first: a row that is nearly right has a loss far below its logits.
        loss = (best - own) + log_total
        if SMOOTH:
            loss = (1.0 - smoothing) * loss + smoothing * ((best - every / k) + log_total)
        counts = tl.load(targets + rows, mask=inside, other=0) != ignored
        tl.store(out, tl.where(counts, loss, 0.0), mask=inside)
        tl.store(out + n, tl.where(counts, best + log_total, 0.0), mask=inside)
    else:
        tl.store(out_index + rows, tl.where(broken, 0, at).to(tl.int64), mask=inside)
        tl.store(out, tl.where(broken, float("nan"), best), mask=inside)
        if LSE:
            tl.store(out + n, best + log_total, mask=inside)
    if ENTROPY:
        tl.store(out + 2 * n, log_tau + spread / total_tau, mask=inside)
        tl.store(out + 3 * n, best * inverse_tau + log_tau, mask=inside)
        tl.store(out + 4 * n, log_tau, mask=inside)
