"""Pixel ranges: uint8 in files, data sets and batches; float32 in [-1, 1] in models."""

from __future__ import annotations

import torch
from torch import Tensor


def to_float(images: Tensor) -> Tensor:
    """uint8 of any shape -> float32 in [-1, 1]: 0 becomes -1, 255 becomes 1. ValueError for another dtype."""
    if images.dtype != torch.uint8:
        raise ValueError(f"images: expected uint8, got {images.dtype}")
    return images.to(torch.float32).div_(127.5).sub_(1.0)


def to_uint8(images: Tensor) -> Tensor:
    """Float of any shape, clipped to [-1, 1] and rounded to the nearest of 256 levels -> uint8.

    Inverts ``to_float`` exactly. ValueError for integers.
    """
    if not images.is_floating_point():
        raise ValueError(f"images: expected floating point in [-1, 1], got {images.dtype}")
    return images.detach().to(torch.float32).clamp(-1.0, 1.0).add(1.0).mul(127.5).round().to(torch.uint8)
