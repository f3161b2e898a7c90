"""The last step of both halves of the backward: partial sums added in order, what they left out added too.

``finish_row_gradient`` adds the peaks' entries of dS, one code each; ``finish_code_gradient`` the hard path
of the selection (a scatter-add of g by index, as sums over rows sorted by code) and the norms' share.
"""

import triton
import triton.language as tl

from ibq_fast.ops.triton.kernels.device import load_tile
from ibq_fast.ops.triton.kernels.logit_gradient import AMOUNT, AMOUNT_TAU, row_value


@triton.jit
def add_peak(
    out,
    data,
    peaks,
    e,
    n,
    rows,
    inside,
    chunk,
    SLOT: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    OUT: tl.constexpr,
):
    peak = tl.load(peaks + GROUP * n + rows, mask=inside, other=-1)
    amount = row_value(data, n, rows, inside, SLOT, 0.0)
    return out + amount[:, None] * load_tile(e, peak.to(tl.int64), peak >= 0, chunk * OUT, D, OUT).to(
        tl.float32
    )


@triton.jit
def finish_row_gradient(
    part_z,
    data,
    peaks,
    e,
    grad_z,
    n,
    scale,
    row_tiles,
    splits,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    OUT: tl.constexpr,
    FIRST: tl.constexpr,
    ENTROPY: tl.constexpr,
):
    """part_z [splits, N, D], data [ROW_SLOTS, N], peaks [2, N], e [K, D] -> grad_z [N, D]. FIRST: there is a
    selection or a loss, ENTROPY: there are entropies."""
    pid = tl.program_id(0)
    chunk = pid // row_tiles
    rows = (pid % row_tiles) * ROWS + tl.arange(0, ROWS)
    inside = rows < n
    rows_at = rows.to(tl.int64)
    out = tl.zeros([ROWS, OUT], tl.float32)
    for split in range(splits):
        out += load_tile(part_z, split * n + rows_at, inside, chunk * OUT, D, OUT)
    if FIRST:
        out = add_peak(out, data, peaks, e, n, rows, inside, chunk, AMOUNT, 0, D, OUT)
    if ENTROPY:
        out = add_peak(out, data, peaks, e, n, rows, inside, chunk, AMOUNT_TAU, 1, D, OUT)
    columns = chunk * OUT + tl.arange(0, OUT)
    into = grad_z + rows_at[:, None] * D + columns[None, :]
    tl.store(into, (out * scale).to(grad_z.dtype.element_ty), mask=inside[:, None] & (columns < D)[None, :])


@triton.jit
def finish_code_gradient(
    part_e,
    boost,
    grad_bias,
    e,
    order,
    starts,
    indices,
    grad_z_q,
    grad_codes,
    grad_e,
    k,
    scale,
    norm_weight,
    code_tiles,
    splits,
    D: tl.constexpr,
    CODES: tl.constexpr,
    ROWS: tl.constexpr,
    OUT: tl.constexpr,
    HITS: tl.constexpr,
    NORMS: tl.constexpr,
):
    """part_e [splits, K, D], boost [1], grad_bias [K]; HITS: rows sorted by code in order [N], the first of
    each code in starts [K + 1], indices [N], grad_z_q and grad_codes [N, D] -> grad_e [K, D]."""
    pid = tl.program_id(0)
    chunk = pid // code_tiles
    codes = (pid % code_tiles) * CODES + tl.arange(0, CODES)
    known = codes < k
    codes_at = codes.to(tl.int64)
    out = tl.zeros([CODES, OUT], tl.float32)
    for split in range(splits):
        out += load_tile(part_e, split * k + codes_at, known, chunk * OUT, D, OUT)
    out *= scale / tl.load(boost)
    if NORMS:
        share = -2.0 * norm_weight * tl.load(grad_bias + codes, mask=known, other=0.0)
        out += share[:, None] * load_tile(e, codes_at, known, chunk * OUT, D, OUT).to(tl.float32)
    if HITS:
        first = tl.load(starts + (pid % code_tiles) * CODES)
        last = tl.load(starts + tl.minimum((pid % code_tiles + 1) * CODES, k))
        for at in range(first, last, ROWS):
            place = at + tl.arange(0, ROWS)
            inside = place < last
            rows = tl.load(order + place, mask=inside, other=0)
            hit = tl.load(indices + rows, mask=inside, other=-1)
            g = load_tile(grad_z_q, rows, inside, chunk * OUT, D, OUT).to(tl.float32)
            g += load_tile(grad_codes, rows, inside, chunk * OUT, D, OUT).to(tl.float32)
            own = tl.where(codes_at[:, None] == hit[None, :], 1.0, 0.0)
            out = tl.dot(own, g, out, input_precision="ieee")
    columns = chunk * OUT + tl.arange(0, OUT)
    into = grad_e + codes_at[:, None] * D + columns[None, :]
    tl.store(into, out.to(grad_e.dtype.element_ty), mask=known[:, None] & (columns < D)[None, :])
