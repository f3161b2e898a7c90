"""dS of a tile, from its logits and what is known of its rows (docs/architecture.md, equations 2, 5 and 6).

A row that one code has nearly whole (P > 3/4) has that code as its *peak*. Its entry of dS is a difference of
nearly equal numbers; as rows of dS add up to 0, it is minus the sum of the others. ``row_gradient`` leaves
it out (``amount`` 0) and sums the others, ``code_gradient`` then puts the amount in. Row values and codes
come expanded to broadcast against the tile, whichever way it lies.
"""

import triton
import triton.language as tl

from ibq_fast.ops.triton.kernels.device import cut

# Slots of what is known of a row, float32 [ROW_SLOTS, N]; the first two serve the selection or the loss.
ROW_SLOTS = tl.constexpr(10)
LSE = tl.constexpr(0)
DELTA = tl.constexpr(1)  # g · o of the selection, the incoming gradient of the loss
CENTER = tl.constexpr(2)  # τ times the mean of S/τ under p, about which the entropies' exponents are taken
LOG_TOTAL = tl.constexpr(3)  # log Σ exp((S - center)/τ)
MEAN_Y = tl.constexpr(4)  # mean of (S - center)/τ under p
SLOPE = tl.constexpr(5)  # gradient of the row's entropy, over τ
MEAN_C = tl.constexpr(6)  # mean of c under p
AMOUNT = tl.constexpr(7)
AMOUNT_TAU = tl.constexpr(8)
BOOST = tl.constexpr(9)  # power of two that brings dS into the range of float16


@triton.jit
def row_value(data, n, rows, inside, SLOT: tl.constexpr, other):
    return tl.load(data + SLOT * n + rows, mask=inside, other=other)


@triton.jit
def selection(s, dots, codes, lse, delta, peak, amount):
    """P (g·E - δ), P = exp(S - lse); dots: g·E."""
    return tl.where(codes == peak, amount, tl.exp(s - lse) * (dots - delta))


@triton.jit
def entropies(s, c, codes, inverse_tau, center, log_total, mean_y, slope, mean_c, peak, amount):
    """p [ c - mean c - slope (y - mean y) ], y = (S - center)/τ; c and slope hold 1/τ and 1/N."""
    y = cut((s - center) * inverse_tau)
    p = tl.exp(y - log_total)
    return tl.where(codes == peak, amount, p * ((c - mean_c) - slope * (y - mean_y)))


@triton.jit
def loss(s, codes, known, lse, weight, target, hit, share, peak, amount):
    """weight (P - q), q = share + hit at the target."""
    q = tl.where(codes == target, hit + share, share)
    ds = tl.where(known, weight * (tl.exp(s - lse) - q), 0.0)
    return tl.where(codes == peak, amount, ds)
