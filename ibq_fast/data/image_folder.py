"""``root/class/*.jpg`` as a data set that survives, counts and names its bad images."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from ibq_fast.data import counter
from ibq_fast.data.decode import MAX_PIXELS, BadImageError, Fault, decode_image
from ibq_fast.data.errors import DataError
from ibq_fast.data.paths import Part, find_images
from ibq_fast.data.transform import Crop, Interpolation, SquareCrop, SquareViews

_REPLACEMENTS = 100  # draws before giving up on one item; with half of the images bad, 1e-30 to get there
_log = logging.getLogger(__name__)


class ImageFolder(Dataset[tuple[Tensor, int]]):
    """Images of any size and common format, one folder per class, as (uint8 [C, R, R], label).

    **Bad images** (unreadable, truncated, not an image, a decompression bomb) do not stop a run. Each is
    logged once by path, counted, and replaced by another image, drawn as a function of (seed, epoch, index);
    an evaluation batch (``train=False``, through a loader) leaves it out instead. More than
    ``max_bad_fraction`` of all images of the set bad: DataError.

    **State.** One byte per image in shared memory, written by whichever process finds it bad: so the count is
    visible in the main process and to every worker. It is not saved in checkpoints (a resumed run finds the
    bad images again); the ranks of a distributed run tell each other at every logging interval
    (``merge_faults``). Workers only mark; the main process logs, when ``report`` is called (the loader of
    ``build_loader`` does so after every batch).

    **Randomness.** ``dataset[epoch, index]`` is a function of the files, seed, epoch and index alone.

    Args:
        root: folder of class folders.
        resolution: side of the images in pixels.
        train: random crop and flip (else the middle square, never flipped).
        channels: 3 (RGB) or 1 (grey).
        crop: in training: "random", "random_resized" or "center".
        min_scale: smallest share of the area for "random_resized".
        flip: in training: mirror with probability 1/2.
        interpolation: "bicubic" or "bilinear", both antialiased.
        max_bad_fraction: largest share of bad images that is tolerated.
        max_pixels: an image with more counts as bad.
        classes, part, val_fraction: see ``find_images``.
        seed: of crops, flips and replacements.

    Raises DataError when there is nothing to read, ValueError for arguments out of range.
    """

    def __init__(
        self,
        root: str | Path,
        resolution: int,
        *,
        train: bool,
        channels: int = 3,
        crop: Crop = "random",
        min_scale: float = 0.5,
        flip: bool = True,
        interpolation: Interpolation = "bicubic",
        max_bad_fraction: float = 0.01,
        max_pixels: int = MAX_PIXELS,
        classes: Sequence[str] | None = None,
        part: Part = "all",
        val_fraction: float = 0.0,
        seed: int = 0,
    ) -> None:
        if channels not in (1, 3):
            raise ValueError(f"channels: expected 1 or 3, got {channels}")
        if not 0.0 <= max_bad_fraction <= 1.0:
            raise ValueError(f"max_bad_fraction: expected a share in [0, 1], got {max_bad_fraction}")
        self.paths = find_images(root, classes=classes, part=part, val_fraction=val_fraction)
        self.classes = self.paths.classes
        self.train, self.channels, self.seed = train, channels, seed
        self.transform: SquareCrop | SquareViews = SquareCrop(
            resolution, crop if train else "center", min_scale, flip and train, interpolation
        )
        self.max_bad_fraction, self.max_pixels = max_bad_fraction, max_pixels
        self._faults = torch.zeros(len(self.paths), dtype=torch.uint8).share_memory_()
        self._reported: set[int] = set()

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, int]:
        """Item ``index``, or ``(epoch, index)`` to say in which epoch (0 otherwise). A bad one is replaced.

        Raises IndexError, and DataError when more than ``max_bad_fraction`` of the images is bad.
        """
        epoch, index = key if isinstance(key, tuple) else (0, key)
        if not -len(self) <= index < len(self):
            raise IndexError(f"index: expected one below {len(self)}, got {index}")
        index %= len(self)
        item = self._read(index, epoch, index)
        attempt = 0
        while item is None and attempt < _REPLACEMENTS:
            bits = int(counter.random_bits(self.seed, epoch, index, counter.REPLACE + attempt)[0])
            item = self._read(bits % len(self), epoch, index)
            attempt += 1
        if item is None:
            raise DataError(f"{self.paths[index]}: bad, and so are {attempt} images drawn to replace it")
        return item

    def __getitems__(self, keys: Sequence[int | tuple[int, int]]) -> list[tuple[Tensor, int]]:
        """What a loader calls: the items of one batch; in evaluation, the good ones among them."""
        if self.train:
            return [self[key] for key in keys]
        pairs = [key if isinstance(key, tuple) else (0, key) for key in keys]
        items = [self._read(index, epoch, index) for epoch, index in pairs]
        return [item for item in items if item is not None]

    @property
    def bad(self) -> list[tuple[Path, str]]:
        """(path, reason) of every image found bad so far, by any worker of this process."""
        return [(self.paths[index], Fault(fault).reason) for index, fault in self.faults]

    @property
    def faults(self) -> list[tuple[int, int]]:
        """(index, fault) of every image found bad so far, by any worker of this process."""
        found = torch.nonzero(self._faults).flatten().tolist()
        return [(index, int(self._faults[index])) for index in found]

    def merge_faults(self, faults: Sequence[tuple[int, int]]) -> int:
        """Take ``faults``, found by other processes of the run, for known: they are not logged again.

        Returns the number of bad images so far; raises as ``report``.
        """
        self.report()
        for index, fault in faults:
            self._faults[index] = fault
            self._reported.add(index)
        return self.report()

    def report(self) -> int:
        """Log each bad image that was not logged yet; the number of bad images so far.

        Raises DataError when it exceeds ``max_bad_fraction`` of the set.
        """
        if int(torch.count_nonzero(self._faults)) > len(self._reported):
            for index, fault in self.faults:
                if index not in self._reported:
                    self._reported.add(index)
                    _log.warning("bad image skipped: %s: %s", self.paths[index], Fault(fault).reason)
        self._check_share()
        return len(self._reported)

    def _read(self, source: int, epoch: int, index: int) -> tuple[Tensor, int] | None:
        """Image ``source`` with the random numbers of item ``index``; None, and marked, when it is bad."""
        if self._faults[source]:
            return None
        try:
            image = decode_image(self.paths[source], self.channels, max_pixels=self.max_pixels)
        except BadImageError as error:
            self._faults[source] = int(error.fault)
            if get_worker_info() is None:
                self.report()
            self._check_share()
            return None
        return self.transform(image, self.seed, epoch, index), int(self.paths.labels[source])

    def _check_share(self) -> None:
        count = int(torch.count_nonzero(self._faults))
        if count > self.max_bad_fraction * len(self):
            examples = "; ".join(f"{path} ({reason})" for path, reason in self.bad[:3])
            raise DataError(
                f"{self.paths.root}: {count} of {len(self)} images are bad, more than max_bad_fraction "
                f"{self.max_bad_fraction}: {examples}{'; …' if count > 3 else ''}"
            )
