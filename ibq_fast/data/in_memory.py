"""Images held in memory: a batch is one index operation, so there is nothing for workers to do."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.utils.data import Dataset

from ibq_fast.data import counter


class InMemoryImages(Dataset[tuple[Tensor, int]]):
    """A labelled set of equally large images in one tensor.

    Args:
        images: uint8 [N, 1 or 3, H, W]; one channel is repeated to ``channels`` when images leave the set.
        labels: int64 [N].
        classes: the name of each label.
        channels: 1 or 3, channels of the images that leave the set.
        flip: mirror each image left to right with probability 1/2, decided by (seed, epoch, index).
        seed: of the flips.

    Raises ValueError when shapes, dtypes or channels do not fit.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        classes: tuple[str, ...],
        *,
        channels: int | None = None,
        flip: bool = False,
        seed: int = 0,
    ) -> None:
        if images.ndim != 4 or images.dtype != torch.uint8 or images.shape[1] not in (1, 3):
            raise ValueError(
                f"images: expected uint8 [N, 1 or 3, H, W], got {images.dtype} {list(images.shape)}"
            )
        if labels.shape != images.shape[:1] or labels.dtype != torch.int64:
            raise ValueError(
                f"labels: expected int64 [{len(images)}], got {labels.dtype} {list(labels.shape)}"
            )
        self.channels = images.shape[1] if channels is None else channels
        if self.channels != images.shape[1] and (images.shape[1], self.channels) != (1, 3):
            raise ValueError(f"channels: expected {images.shape[1]} (or 3 from 1), got {channels}")
        self.images, self.labels, self.classes = images, labels, classes
        self.flip, self.seed = flip, seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, int]:
        """Item ``index``, or ``(epoch, index)`` to say in which epoch (else 0): uint8 [C, H, W] and label."""
        epoch, index = key if isinstance(key, tuple) else (0, key)
        if not -len(self) <= index < len(self):
            raise IndexError(f"index: expected one below {len(self)}, got {index}")
        images, labels = self.batch(epoch, [index % len(self)])
        return images[0], int(labels[0])

    def batch(self, epoch: int, indices: ArrayLike) -> tuple[Tensor, Tensor]:
        """Items ``indices`` [B] as ``epoch`` shows them: uint8 [B, C, H, W] and int64 [B], both new."""
        chosen = np.asarray(indices, np.int64)
        at = torch.from_numpy(chosen)
        images = self.images[at]
        if self.flip:
            mirrored = torch.from_numpy(counter.uniform(self.seed, epoch, chosen, counter.FLIP) < 0.5)
            images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
        return images.expand(-1, self.channels, -1, -1).contiguous(), self.labels[at]
