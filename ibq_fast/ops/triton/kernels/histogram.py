"""count_codes: how often each code occurs. Integer additions, whose order changes nothing."""

import triton
import triton.language as tl


@triton.jit
def count_codes(indices, counts, n, k, ROWS: tl.constexpr):
    """indices [N] int64 -> counts [K] int32, zeroed before; an index outside [0, K) is left out."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    index = tl.load(indices + rows, mask=rows < n, other=-1)
    tl.atomic_add(counts + index, tl.full([ROWS], 1, tl.int32), mask=(index >= 0) & (index < k))
