"""k-means of feature rows, for a codebook's first codes: Lloyd's iterations over the search operator."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from ibq_fast.codebook_parallel import CodebookShards, parallel_search
from ibq_fast.codebook_parallel.shards import PIECE
from ibq_fast.ops import codebook_search

# Noise on repeated rows, in standard deviations of the rows: distinct codes, same neighbourhood.
_REPEAT_NOISE = 0.01


def random_rows(rows: Tensor, count: int) -> Tensor:
    """``count`` of ``rows`` [N, D] in random order; with N < count they are repeated with a little noise."""
    chosen = rows.new_empty((count, rows.shape[1]))
    for start, piece in zip(range(0, count, PIECE), _random_pieces(rows, count), strict=True):
        chosen[start : start + PIECE] = piece
    return chosen


def first_random_rows(rows: Tensor, count: int, shards: CodebookShards | None = None) -> Tensor:
    """The first process's ``random_rows``, or with ``shards`` the own part of them; all call it together."""
    if shards is not None:
        own = rows.new_empty((shards.stop - shards.start, rows.shape[1]))
        shards.hand_out(_random_pieces(rows, count) if dist.get_rank() == 0 else None, own)
        return own
    return _from_first(random_rows(rows, count))


@torch.no_grad()
def kmeans(rows: Tensor, count: int, iterations: int = 10, shards: CodebookShards | None = None) -> Tensor:
    """``count`` centres [count, D] of ``rows`` [N, D] (Euclidean), in the dtype of ``rows``.

    Starts at random rows. A centre that lost all its rows moves to a random row. With N <= count the centres
    are the rows themselves, as :func:`random_rows`. In distributed training every process calls it together,
    each with its own rows: the centres are those of all rows, and the same everywhere; with ``shards`` each
    process has its part of them.
    """
    centres = first_random_rows(rows, count, shards)
    if _total(rows) <= count:
        return centres
    seen = rows if shards is None else shards.gather(rows, shards.counts(rows.shape[0]))
    wide = seen.float()
    for _ in range(iterations):
        nearest = _nearest(rows, centres, shards)
        own = slice(None) if shards is None else (nearest >= 0) & (nearest < len(centres))
        sums = torch.zeros_like(centres, dtype=torch.float32).index_add_(0, nearest[own], wide[own])
        sizes = torch.bincount(nearest[own], minlength=len(centres)).float()
        if shards is None and _distributed():
            dist.all_reduce(sums)
            dist.all_reduce(sizes)
        if shards is not None and shards.replicas is not None:
            dist.all_reduce(sums, group=shards.replicas)
            dist.all_reduce(sizes, group=shards.replicas)
        empty = sizes == 0
        moved = first_random_rows(rows, count, shards)
        means = (sums / sizes.clamp_min(1).unsqueeze(1)).to(rows.dtype)
        centres = torch.where(empty.unsqueeze(1), moved, means)
    return centres


def _nearest(rows: Tensor, centres: Tensor, shards: CodebookShards | None) -> Tensor:
    """The nearest centre of each of the rows; with ``shards``, of the group's, less the first own one."""
    norms = torch.linalg.vector_norm(centres, dim=1, dtype=torch.float32).square()
    if shards is None:
        return codebook_search(rows, centres, scale=2.0, bias=-norms).indices
    nearest = parallel_search(shards, rows, centres, scale=2.0, bias=-norms)
    return shards.gather(nearest, shards.counts(rows.shape[0])) - shards.start


def _random_pieces(rows: Tensor, count: int) -> Iterator[Tensor]:
    """:func:`random_rows`, at most PIECE at a time."""
    order = torch.randperm(rows.shape[0], device=rows.device)
    spread = _REPEAT_NOISE * rows.std(correction=0)
    for start in range(0, count, PIECE):
        places = torch.arange(start, min(start + PIECE, count), device=rows.device)
        chosen = rows[order[places % len(order)]]
        repeats = chosen[max(len(order) - start, 0) :]
        repeats += spread * torch.randn_like(repeats)
        yield chosen


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
