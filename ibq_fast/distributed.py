"""What the package needs of torch.distributed; with one process everything here is the identity."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of processes of the default group; 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@torch.compiler.disable
def mean_over_all_rows(mean: Tensor, rows: int, group: Any = None) -> Tensor:
    """The mean over the rows of all processes (of ``group``), from each one's ``mean`` [K] over its own
    ``rows``.

    p = Σ_r n_r m_r / N with N = Σ_r n_r, the same on every process; zeros when N = 0. All processes have to
    call it together. ``mean`` is float32 or wider.

    **Gradient.** Made for gradients that are averaged over processes afterwards, as DistributedDataParallel
    and FSDP do. Let every one of R processes add the same f(p) to its loss. One process with all rows would
    have the gradient f'(p) Σ_r (n_r / N) ∂m_r/∂θ. The average of what the processes compute,
    (1/R) Σ_r c_r f'(p) ∂m_r/∂θ, equals it for c_r = R n_r / N: that is the factor of the backward, 1 where
    all have equally many rows. (∂p/∂m_r = n_r/N alone would be too small by R: p is on every process, and
    each differentiates its own copy.) The incoming gradients are equal on all processes, since f and p are,
    so the backward communicates nothing.
    """
    if world_size() == 1:
        return mean
    result: Tensor = _MeanOverAllRows.apply(mean, rows, group)
    return result


class _MeanOverAllRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mean: Tensor, rows: int, group: Any) -> Tensor:
        packed = torch.empty(mean.numel() + 1, dtype=mean.dtype, device=mean.device)
        torch.mul(mean, rows, out=packed[:-1])
        packed[-1] = rows
        dist.all_reduce(packed, group=group)
        total = packed[-1].clamp_min(1.0)
        ctx.factor = dist.get_world_size(group) * rows / total
        return packed[:-1] / total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0] * ctx.factor, None, None
