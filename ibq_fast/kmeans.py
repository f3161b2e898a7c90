"""k-means of feature rows, for a codebook's first codes: Lloyd's iterations over the search operator."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ibq_fast.ops import codebook_search

# Noise on repeated rows, in standard deviations of the rows: distinct codes, same neighbourhood.
_REPEAT_NOISE = 0.01


def random_rows(rows: Tensor, count: int) -> Tensor:
    """``count`` of ``rows`` [N, D] in random order; with N < count they are repeated with a little noise."""
    order = torch.randperm(rows.shape[0], device=rows.device)
    chosen = rows[order.repeat(-(-count // rows.shape[0]))[:count]]
    repeats = chosen[rows.shape[0] :]
    repeats += _REPEAT_NOISE * rows.std(correction=0) * torch.randn_like(repeats)
    return chosen


@torch.no_grad()
def kmeans(rows: Tensor, count: int, iterations: int = 10) -> Tensor:
    """``count`` centres [count, D] of ``rows`` [N, D] (Euclidean), in the dtype of ``rows``.

    Starts at random rows. A centre that lost all its rows moves to a random row. With N <= count the centres
    are the rows themselves, as :func:`random_rows`. In distributed training every process calls it together,
    each with its own rows: the centres are those of all rows, and the same everywhere.
    """
    centres = _from_first(random_rows(rows, count))
    if _total(rows) <= count:
        return centres
    wide = rows.float()
    for _ in range(iterations):
        norms = torch.linalg.vector_norm(centres, dim=1, dtype=torch.float32).square()
        nearest = codebook_search(rows, centres, scale=2.0, bias=-norms).indices
        sums = torch.zeros(count, rows.shape[1], device=rows.device).index_add_(0, nearest, wide)
        sizes = torch.bincount(nearest, minlength=count).float()
        if _distributed():
            dist.all_reduce(sums)
            dist.all_reduce(sizes)
        empty = sizes == 0
        moved = _from_first(random_rows(rows, count))
        means = (sums / sizes.clamp_min(1).unsqueeze(1)).to(rows.dtype)
        centres = torch.where(empty.unsqueeze(1), moved, means)
    return centres


def _total(rows: Tensor) -> int:
    total = torch.tensor(rows.shape[0], device=rows.device)
    if _distributed():
        dist.all_reduce(total)
    return int(total)


def _from_first(values: Tensor) -> Tensor:
    """The first process's ``values``."""
    if _distributed():
        dist.broadcast(values, 0)
    return values


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()
