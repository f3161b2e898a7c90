"""Which process holds which codes, and the exchanges between the holders of one codebook."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Rows that travel, or are drawn, at a time when a codebook is handed out or collected.
PIECE = 1 << 16


class CodebookShards:
    """The rows of a codebook [K, D] over a group of ``size`` processes: rank r has ``start`` to ``stop``.

    ``size`` consecutive ranks share a codebook; every ``size``-th rank has the same rows (``replicas``: their
    group, None where there is one codebook; ``with_first``: whether the group is that of the first process).
    All processes build it together, each sees its own place.

    codebook_size: K, at least ``size``; the parts differ by one row at most. size: a divisor of the number of
    processes, all of them by default. device: where the exchanged tensors are (NCCL takes a GPU's only).
    timeout: of the groups' exchanges. Raises ValueError.
    """

    def __init__(
        self,
        codebook_size: int,
        size: int | None = None,
        *,
        device: torch.device | str = "cpu",
        timeout: timedelta | None = None,
    ) -> None:
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            raise ValueError("codebook_parallel: expected several processes (torchrun), got one")
        world, place = dist.get_world_size(), dist.get_rank()
        self.size = world if size is None else size
        if self.size < 2 or world % self.size:
            raise ValueError(
                f"codebook_parallel: expected a divisor of the {world} processes, from 2 on, got {self.size}"
            )
        if codebook_size < self.size:
            raise ValueError(
                f"codebook_parallel: expected a code for each of {self.size} processes, got {codebook_size}"
            )
        self.codebook_size = codebook_size
        self.device = torch.device(device)
        self._bounds = [codebook_size * r // self.size for r in range(self.size + 1)]
        self.rank = place % self.size
        first_of_group = place - self.rank
        self.with_first = first_of_group == 0
        self.group: Any = dist.group.WORLD
        self.replicas: Any = None
        if self.size < world:  # every process has to make every group
            for first in range(0, world, self.size):
                group = dist.new_group(list(range(first, first + self.size)), timeout=timeout)
                if first == first_of_group:
                    self.group = group
            for r in range(self.size):
                group = dist.new_group(list(range(r, world, self.size)), timeout=timeout)
                if r == self.rank:
                    self.replicas = group

    def __deepcopy__(self, memo: dict[int, Any]) -> CodebookShards:
        return self  # groups of processes are shared by what uses them

    @property
    def start(self) -> int:
        return self._bounds[self.rank]

    @property
    def stop(self) -> int:
        return self._bounds[self.rank + 1]

    def part(self, whole: Tensor) -> Tensor:
        """The own rows of ``whole`` [K, ...], a view."""
        return whole[self.start : self.stop]

    def counts(self, rows: int) -> list[int]:
        """Everyone's number of rows."""
        own = torch.tensor([rows], device=self.device)
        return [int(count) for count in self.each(own).flatten().tolist()]

    def gather(self, own: Tensor, counts: list[int]) -> Tensor:
        """Everyone's rows, in the order of ranks: [Σ counts, ...] from ``own`` [counts[rank], ...]."""
        most = max(counts)
        if most == 0:
            return own
        own = _padded(own, most)
        parts = [torch.empty_like(own) for _ in counts]
        dist.all_gather(parts, own, group=self.group)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    def each(self, own: Tensor) -> Tensor:
        """Everyone's tensor of one shape: [size, ...]."""
        if own.numel() == 0:
            return own.expand(self.size, *own.shape)
        parts = [torch.empty_like(own, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(parts, own.contiguous(), group=self.group)
        return torch.stack(parts)

    def sum(self, values: Tensor) -> Tensor:
        """The sum of everyone's ``values``, in their place."""
        if values.numel():
            dist.all_reduce(values, group=self.group)
        return values

    def sum_to_owners(self, values: Tensor, counts: list[int]) -> Tensor:
        """The sum of everyone's ``values`` [Σ counts, ...], of which each gets its own rows."""
        most = max(counts)
        if most == 0:
            return values
        parts = [
            part
            if len(part) == most
            else torch.cat([part, part.new_zeros(most - len(part), *part.shape[1:])])
            for part in values.split(counts)
        ]
        own = torch.empty_like(parts[0], memory_format=torch.contiguous_format)
        dist.reduce_scatter(own, [part.contiguous() for part in parts], group=self.group)
        return own[: counts[self.rank]]

    def columns(self, values: Tensor, counts: list[int]) -> Tensor:
        """[counts[rank], K] of the own rows, from everyone's ``values`` [Σ counts, K_r] of its own codes."""
        widths = [stop - start for start, stop in pairwise(self._bounds)]
        everyone = self.gather(values.T, widths).T
        return everyone.split(counts)[self.rank].contiguous()

    def any(self, own: bool) -> bool:
        """Whether anyone's ``own`` is true."""
        return bool(self.sum(torch.tensor(int(own), device=self.device)))

    def pieces(self) -> Iterator[tuple[int, slice]]:
        """(holder, rows of the whole codebook), in order: how a codebook travels."""
        for holder in range(self.size):
            for start in range(self._bounds[holder], self._bounds[holder + 1], PIECE):
                yield holder, slice(start, min(start + PIECE, self._bounds[holder + 1]))

    def hand_out(self, pieces: Iterator[Tensor] | None, own: Tensor) -> None:
        """Fill everyone's ``own`` rows from the first process of all, whose ``pieces`` are the whole, cut
        anywhere; None on the others.
        """
        sizes = [rows.stop - rows.start for _, rows in self.pieces()]
        cut = None if pieces is None else _recut(pieces, sizes)
        for holder, rows in self.pieces():
            if cut is not None:
                piece = next(cut).to(self.device, own.dtype).contiguous()
            else:
                piece = own.new_empty((rows.stop - rows.start, *own.shape[1:]), device=self.device)
            dist.broadcast(piece, 0)
            if holder == self.rank:
                own[rows.start - self.start : rows.stop - self.start] = piece


def _recut(pieces: Iterator[Tensor], sizes: list[int]) -> Iterator[Tensor]:
    """The same rows in pieces of other ``sizes``."""
    left = next(pieces)
    for size in sizes:
        while len(left) < size:
            left = torch.cat([left, next(pieces)])
        yield left[:size]
        left = left[size:]


def _padded(rows: Tensor, count: int) -> Tensor:
    """``rows`` with zeros below, ``count`` in all, contiguous."""
    if rows.shape[0] == count:
        return rows.contiguous()
    return torch.cat([rows, rows.new_zeros(count - rows.shape[0], *rows.shape[1:])])
