"""From a decoded image of any size to the square that a protocol asks for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ibq_fast.data import DataError, SquareCrop
from ibq_fast.evaluate.protocols import Resize


@dataclass(frozen=True)
class Resizer:
    """Calling it gives uint8 [C, resolution, resolution]; settings as in ``Protocol``.

    Raises DataError, naming the sizes, with resize "none" for an image of another size.
    """

    resolution: int
    resize: Resize

    def __call__(self, image: Image.Image) -> Tensor:
        kinds: dict[Resize, Callable[[Image.Image], Tensor]] = {
            "bicubic-antialiased": lambda x: SquareCrop(self.resolution)(x, 0, 0, 0),
            "bilinear-antialiased": lambda x: SquareCrop(self.resolution, interpolation="bilinear")(
                x, 0, 0, 0
            ),
            "bilinear-opencv": self._opencv,
            "none": self._as_it_is,
        }
        return kinds[self.resize](image)

    def _opencv(self, image: Image.Image) -> Tensor:
        """Shorter side to the resolution, then the middle square of whole pixels, as albumentations'
        SmallestMaxSize and CenterCrop do it."""
        pixels = np.array(image)
        pixels = pixels.reshape(*pixels.shape[:2], -1)
        scale = self.resolution / min(pixels.shape[:2])
        height, width = (max(_round_half_up(side * scale), self.resolution) for side in pixels.shape[:2])
        if (height, width) != pixels.shape[:2]:
            pixels = _bilinear_fixed_point(pixels, height, width)
        top, left = (height - self.resolution) // 2, (width - self.resolution) // 2
        square = pixels[top : top + self.resolution, left : left + self.resolution]
        return torch.from_numpy(np.ascontiguousarray(square.transpose(2, 0, 1)))

    def _as_it_is(self, image: Image.Image) -> Tensor:
        if image.size != (self.resolution, self.resolution):
            wanted = f"{self.resolution} x {self.resolution}"
            raise DataError(f"images: expected {wanted} pixels, got {image.width} x {image.height}")
        return _pixels(image)


def _bilinear_fixed_point(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 [H, W, C] -> [height, width, C] by two taps with half-pixel centres and 11-bit weights, which is
    bit for bit what OpenCV's INTER_LINEAR gives (4.14 and 5.0)."""
    left, fx = _taps(pixels.shape[1], width)
    # Beyond the first and last column the weight is dropped; beyond rows both taps are the border's.
    fx = np.where((left < 0) | (left >= pixels.shape[1] - 1), np.float32(0), fx)
    x0, x1 = _clamped(left, pixels.shape[1])
    top, fy = _taps(pixels.shape[0], height)
    y0, y1 = _clamped(top, pixels.shape[0])
    (a0, a1), (b0, b1) = _weights(fx), _weights(fy)
    wide = pixels.astype(np.int32)
    rows = (wide[:, x0] * a0[:, None] + wide[:, x1] * a1[:, None]) >> 4
    above, below = b0[:, None, None] * rows[y0], b1[:, None, None] * rows[y1]
    return (((above >> 16) + (below >> 16) + 2) >> 2).astype(np.uint8)


def _taps(size: int, wanted: int) -> tuple[np.ndarray, np.ndarray]:
    """The lower of the two pixels that each new one lies between, and how far beyond it, in [0, 1)."""
    position = ((np.arange(wanted) + 0.5) * (size / wanted) - 0.5).astype(np.float32)
    lower = np.floor(position).astype(np.int64)
    return lower, position - lower.astype(np.float32)


def _clamped(lower: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    return lower.clip(0, size - 1), (lower + 1).clip(0, size - 1)


def _weights(fraction: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    one = np.float32(2048)
    return tuple(np.rint(w * one).astype(np.int32) for w in (np.float32(1) - fraction, fraction))  # type: ignore[return-value]


def _round_half_up(value: float) -> int:
    return int(np.floor(value + 0.5))


def _pixels(image: Image.Image) -> Tensor:
    pixels = np.array(image)
    return torch.from_numpy(np.ascontiguousarray(pixels.reshape(*pixels.shape[:2], -1).transpose(2, 0, 1)))
