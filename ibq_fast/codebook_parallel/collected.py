"""What is split by codes, read as a whole by the first process, one piece at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from ibq_fast.codebook_parallel.shards import CodebookShards


class CollectedRows:
    """The whole [K, ...] of which each holder has ``own`` rows [K_r, ...]: a codebook, or what is kept of it.

    The first process of all takes the :meth:`pieces`; whoever has made a CollectedRows calls :meth:`finish`,
    in the same order everywhere. Nobody holds more than a piece of another's rows.
    """

    def __init__(self, shards: CodebookShards, own: Tensor) -> None:
        self.shape = torch.Size((shards.codebook_size, *own.shape[1:]))
        self.dtype = own.dtype
        self._shards = shards
        self._own = own.detach()
        self._left = self._pieces()

    def pieces(self) -> Iterator[Tensor]:
        """Consecutive rows, on the CPU; once, and on the first process only."""
        return self._left

    def finish(self) -> None:
        """Hand over the own rows, or take and forget those of others that were not taken yet."""
        for _ in self._left:
            pass

    def _pieces(self) -> Iterator[Tensor]:
        shards = self._shards
        if not shards.with_first:  # another group, of the same rows
            return
        for holder, rows in shards.pieces():
            if holder == shards.rank:
                piece = self._own[rows.start - shards.start : rows.stop - shards.start]
                if holder != 0:
                    dist.send(piece.to(shards.device).contiguous(), 0, group=shards.group)
                else:
                    yield piece.cpu()
            elif shards.rank == 0:
                piece = self._own.new_empty((rows.stop - rows.start, *self.shape[1:]), device=shards.device)
                dist.recv(piece, holder, group=shards.group)
                yield piece.cpu()


def collect(shards: CodebookShards, own: Tensor) -> Tensor | None:
    """The whole of everyone's ``own`` rows, on the CPU of the first process of all; None on the others."""
    rows = CollectedRows(shards, own)
    if dist.get_rank() != 0:
        rows.finish()
        return None
    whole = torch.empty(rows.shape, dtype=rows.dtype)
    at = 0
    for piece in rows.pieces():
        whole[at : at + len(piece)] = piece
        at += len(piece)
    return whole
