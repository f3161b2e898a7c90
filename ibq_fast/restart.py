"""Codes that nothing chooses any more: counting them, and where they start again."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


@torch.no_grad()
def count_idle(idle: Tensor, indices: Tensor) -> None:
    """One batch more on ``idle`` int64 [K], zero for the codes in ``indices`` int64 [N] of any process."""
    used = torch.zeros_like(idle)
    used[indices] = 1
    if _distributed():
        dist.all_reduce(used, op=dist.ReduceOp.MAX)
    idle.add_(1).masked_fill_(used.bool(), 0)


@torch.no_grad()
def far_rows(rows: Tensor, distances: Tensor, count: int) -> Tensor:
    """``count`` different ones of ``rows`` [N, D], count <= N, drawn in proportion to ``distances`` [N] >= 0.

    Rows at distance 0 come last. In distributed training every process calls it together and all get the main
    process's rows.
    """
    weights = distances + torch.finfo(distances.dtype).tiny
    chosen = rows[torch.multinomial(weights, count)]
    if _distributed():
        dist.broadcast(chosen, 0)
    return chosen


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()
