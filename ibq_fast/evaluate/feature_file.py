"""Feature vectors of a set on the disk, where nearest neighbours are looked for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor


class FeatureFile:
    """float32 [rows, width] in a ``.npy`` file: the features of ``rows`` images spread evenly over a set of
    ``images``, or of all of them. Any process writes any row.
    """

    def __init__(self, path: Path, images: int, width: int, most: int | None) -> None:
        self.path, self.width = path, width
        count = images if most is None else min(most, images)
        self.chosen = torch.arange(count) * images // max(count, 1)

    def create(self) -> None:
        """Make the file, unless one of this shape is there. For the main process, before the others open
        it."""
        shape = (len(self.chosen), self.width)
        if self.path.exists() and np.load(self.path, mmap_mode="r").shape == shape:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        np.lib.format.open_memmap(self.path, "w+", np.float32, shape).flush()

    def write(self, indices: Tensor, features: Tensor) -> None:
        """Keep the features [B, width] of those of the images ``indices`` [B] that are among the chosen."""
        rows = torch.searchsorted(self.chosen, indices)
        kept = (rows < len(self.chosen)) & (self.chosen[rows.clamp_max(len(self.chosen) - 1)] == indices)
        if bool(kept.any()):
            file = np.load(self.path, mmap_mode="r+")
            file[rows[kept].numpy()] = features.cpu().float()[kept].numpy()

    def read(self, seen: Tensor) -> np.ndarray:
        """The rows of the images that were ``seen``, bool [images]: mapped when that is all of them."""
        file = np.load(self.path, mmap_mode="r")
        rows = seen[self.chosen].numpy()
        return file if rows.all() else file[rows]
