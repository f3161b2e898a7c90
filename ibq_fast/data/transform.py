"""Resize, crop and flip: from a decoded image of any size to a square of the asked resolution."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ibq_fast.data import counter

Crop = Literal["center", "random", "random_resized"]
Interpolation = Literal["bicubic", "bilinear"]

CROPS: tuple[Crop, ...] = ("center", "random", "random_resized")
FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
_ASPECTS = (3 / 4, 4 / 3)  # width / height of a random_resized crop


@dataclass(frozen=True)
class SquareCrop:
    """How an image becomes [C, resolution, resolution].

    Every resize is antialiased (Pillow's filters widen with the reduction), and is made in one step from the
    part of the original that the crop keeps.

    Args:
        resolution: side of the result in pixels.
        crop: "center": shorter side to ``resolution``, the middle square. "random": the same square at a
            random place. "random_resized": a random box of ``min_scale`` to 1 of the area and of 3:4 to 4:3.
        min_scale: smallest share of the area, for "random_resized".
        flip: mirror left to right with probability 1/2.
        interpolation: "bicubic" or "bilinear".
    """

    resolution: int
    crop: Crop = "center"
    min_scale: float = 0.5
    flip: bool = False
    interpolation: Interpolation = "bicubic"

    def __post_init__(self) -> None:
        if self.resolution < 1:
            raise ValueError(f"resolution: expected at least 1 pixel, got {self.resolution}")
        if self.crop not in CROPS:
            raise ValueError(f"crop: expected one of {', '.join(CROPS)}, got {self.crop!r}")
        if not 0.0 < self.min_scale <= 1.0:
            raise ValueError(f"min_scale: expected a share of the area in (0, 1], got {self.min_scale}")
        if self.interpolation not in FILTERS:
            raise ValueError(
                f"interpolation: expected one of {', '.join(FILTERS)}, got {self.interpolation!r}"
            )

    def __call__(self, image: Image.Image, seed: int, epoch: int, index: int) -> Tensor:
        """uint8 [C, resolution, resolution]; what is random is a function of (seed, epoch, index)."""
        box = self._box(image.width, image.height, seed, epoch, index)
        side = (self.resolution, self.resolution)
        pixels = np.array(image.resize(side, FILTERS[self.interpolation], box=box))
        if self.flip and counter.uniform(seed, epoch, index, counter.FLIP)[0] < 0.5:
            pixels = pixels[:, ::-1]
        channels_last = pixels.reshape(*side, -1)
        return torch.from_numpy(np.ascontiguousarray(channels_last.transpose(2, 0, 1)))

    def _box(
        self, width: int, height: int, seed: int, epoch: int, index: int
    ) -> tuple[float, float, float, float]:
        """Left, top, right, bottom of the part that is kept, in pixels of the original."""
        side = float(min(width, height))
        if self.crop == "center":
            return _place(width, height, side, side, 0.5, 0.5)
        area, aspect, x, y = counter.uniform(seed, epoch, index, counter.CROP).tolist()
        if self.crop == "random":
            return _place(width, height, side, side, x, y)
        pixels = width * height * (self.min_scale + (1.0 - self.min_scale) * area)
        low, high = (math.log(limit) for limit in _ASPECTS)
        ratio = math.exp(low + (high - low) * aspect)
        return _place(width, height, math.sqrt(pixels * ratio), math.sqrt(pixels / ratio), x, y)


@dataclass(frozen=True)
class SquareViews:
    """An image as several squares at once: the middle one, then others as ``crop`` draws them.

    Args:
        crop: how the others are drawn; flips are left to whoever takes the views.
        count: squares in all, at least 1.
    """

    crop: SquareCrop
    count: int = 1

    @property
    def resolution(self) -> int:
        """Side of the squares in pixels."""
        return self.crop.resolution

    def __call__(self, image: Image.Image, seed: int, epoch: int, index: int) -> Tensor:
        """uint8 [count, C, resolution, resolution]; a function of (seed, index) alone."""
        plain = replace(self.crop, flip=False)
        squares = [replace(plain, crop="center")(image, seed, 0, index)]
        squares += [plain(image, seed, view, index) for view in range(1, self.count)]
        return torch.stack(squares)


def _place(
    width: int, height: int, w: float, h: float, x: float, y: float
) -> tuple[float, float, float, float]:
    """A box of w by h, made to fit if it is too large, at (x, y) in [0, 1] of the room that it has."""
    w, h = min(w, float(width)), min(h, float(height))
    left, top = (width - w) * x, (height - h) * y
    return left, top, min(left + w, float(width)), min(top + h, float(height))
