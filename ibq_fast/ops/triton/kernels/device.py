"""What the Triton kernels share on the device: tiles of operands, tiles of logits, exponents.

Every kernel walks a one-dimensional grid and names no thread or warp, so that the same source serves
compilers for other machines. A tile is rows × codes or, in kernels that own codes, codes × rows: one product
then feeds the next as its left operand without being transposed.
"""

import triton
import triton.language as tl

# exp(-FAR) is 0 in float32: exponents are cut there, so that a masked code gives 0 and never 0 · ∞.
FAR = tl.constexpr(1.0e4)
LOWEST = tl.constexpr(-3.4028234663852886e38)
NO_CODE = tl.constexpr(2147483647)

# float16 keeps weights from 2^-24 on; those of a softmax go in multiplied by this.
WEIGHT_BOOST = tl.constexpr(16384.0)


@triton.jit
def load_tile(source, rows, row_mask, first, D: tl.constexpr, WIDTH: tl.constexpr):
    """source[rows, first : first + WIDTH] of a row-major [*, D], zeros beyond; rows int64."""
    columns = first + tl.arange(0, WIDTH)
    mask = row_mask[:, None]
    if D % WIDTH != 0:
        mask = mask & (columns < D)[None, :]
    return tl.load(source + rows[:, None] * D + columns[None, :], mask=mask, other=0.0)


@triton.jit
def product(
    a,
    a_rows,
    a_mask,
    b,
    b_rows,
    b_mask,
    D: tl.constexpr,
    DEPTH: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """a[a_rows] @ b[b_rows].T [A, B] in float32, walking D in steps of DEPTH: for D too wide to hold."""
    out = tl.zeros([A, B], tl.float32)
    for first in range(0, D, DEPTH):
        left = load_tile(a, a_rows, a_mask, first, D, DEPTH)
        right = load_tile(b, b_rows, b_mask, first, D, DEPTH)
        out = tl.dot(left, tl.trans(right), out, input_precision=PRECISION)
    return out


@triton.jit
def walk_of(walk, owner, all_tiles, split, splits, tiles_per_split, SKIP: tl.constexpr):
    """Where a program's walk over tiles begins and ends; with SKIP, in the list of the live ones of ``owner``
    (ibq_fast/ops/triton/live.py), which the splits share evenly."""
    if SKIP:
        at = owner * (all_tiles + 1)
        count = tl.load(walk + at)
        each = tl.cdiv(count, splits)
        first = split * each
        return at + 1 + first, at + 1 + tl.minimum(first + each, count)
    else:
        first = split * tiles_per_split
        return first, tl.minimum(first + tiles_per_split, all_tiles)


@triton.jit
def cut(exponent):
    """exponent, no lower than -FAR; NaN stays (a minimum would swallow it)."""
    return tl.where(exponent < -FAR, -FAR, exponent)
