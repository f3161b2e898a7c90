"""Which images make up which batch: a function of (seed, epoch, step, rank), with nothing to replay."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from ibq_fast.data import counter

_log = logging.getLogger(__name__)


class ResumableBatchSampler:
    """The batches of one rank, epoch by epoch, from any step on.

    The images of a step, over all ranks, depend only on ``batch_size * world_size``: ranks get consecutive
    parts of the global batch. So one process with batch 8 sees what two with batch 4 see, in the same order.

    Args:
        size: number of images in the set.
        batch_size: images per rank and step.
        seed: of the order.
        shuffle: a new random order in every epoch; else the order of the set.
        drop_last: leave out the last, incomplete global batch. Otherwise it is divided evenly, and when it
            has fewer images than there are ranks, the last ranks have one batch less than the others.
        rank, world_size: this process and how many there are.

    Raises ValueError for arguments out of range, and when ``drop_last`` would leave no batch.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = True,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        if not 0 <= rank < world_size:
            raise ValueError(
                f"rank: expected one of 0..{world_size - 1} (world_size {world_size}), got {rank}"
            )
        if drop_last and size < batch_size * world_size:
            raise ValueError(
                f"batch_size: expected at most {size // world_size} for {size} images on {world_size} "
                f"processes, got {batch_size}"
            )
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.shuffle, self.drop_last = shuffle, drop_last
        self.rank, self.world_size = rank, world_size
        self._order: tuple[int, NDArray[np.int64]] = (-1, np.empty(0, np.int64))

    @property
    def global_batch(self) -> int:
        """Images per step over all ranks."""
        return self.batch_size * self.world_size

    def __len__(self) -> int:
        """Batches per epoch for this rank."""
        full, rest = divmod(self.size, self.global_batch)
        return full + (not self.drop_last and rest > self.rank)

    def batch(self, epoch: int, step: int) -> NDArray[np.int64]:
        """Indices of the images of this rank, int64 [at most batch_size]."""
        if not 0 <= step < len(self):
            raise IndexError(f"step: expected one of 0..{len(self) - 1}, got {step}")
        if self._order[0] != epoch:
            self._order = (epoch, self._epoch_order(epoch))
        whole = self._order[1][step * self.global_batch : (step + 1) * self.global_batch]
        if len(whole) == self.global_batch:
            return whole[self.rank * self.batch_size : (self.rank + 1) * self.batch_size]
        return np.array_split(whole, self.world_size)[self.rank]

    def batches(self, epoch: int, step: int = 0) -> Iterator[NDArray[np.int64]]:
        """The rest of an epoch from ``step`` on."""
        for at in range(step, len(self)):
            yield self.batch(epoch, at)

    def position_state(self, epoch: int, step: int) -> dict[str, int]:
        """A position, and what it means: seed, number of images, images per step over all ranks."""
        return {
            "epoch": epoch,
            "step": step,
            "seed": self.seed,
            "size": self.size,
            "global_batch": self.global_batch,
        }

    def restored_position(self, state: Mapping[str, int]) -> tuple[int, int]:
        """(epoch, step) where ``position_state`` was taken.

        With another number of images per step (say, on another number of processes) the first step that
        repeats none of the epoch's images: fewer than one step's images of the epoch are left out. Says so in
        the log when the order of images is another one.
        """
        for name in ("seed", "size"):
            here = getattr(self, name)
            if state[name] != here:
                _log.warning(
                    "data: %s is %s, the checkpoint's %s: new order of images", name, here, state[name]
                )
        step = -(-state["step"] * state["global_batch"] // self.global_batch)
        return state["epoch"] + step // len(self), step % len(self)

    def _epoch_order(self, epoch: int) -> NDArray[np.int64]:
        if self.shuffle:
            return counter.permutation(self.seed, epoch, self.size)
        return np.arange(self.size)
