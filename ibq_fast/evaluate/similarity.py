"""How much two sets of images differ, image by image: L1, mean square error, PSNR, SSIM.

All of it on uint8, in exact integer arithmetic up to the last division.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_PEAK = 255.0
_WINDOW = 7
LARGEST_PSNR = 100.0  # dB that an average takes an exactly reproduced image for


class PixelErrors(NamedTuple):
    """Of each image, float64 [B] on the CPU: ``l1`` in [0, 255], ``mse`` in [0, 255²], ``psnr`` in dB (inf:
    equal images)."""

    l1: Tensor
    mse: Tensor
    psnr: Tensor


def pixel_errors(images: Tensor, copies: Tensor) -> PixelErrors:
    """Errors over all of an image's channels and pixels: uint8 [B, C, H, W] twice; peak 255.

    Raises ValueError for other dtypes and for shapes that differ.
    """
    difference = _pair(images, copies)
    pixels = max(difference[0].numel(), 1) if len(difference) else 1
    l1 = difference.abs().flatten(1).sum(1, dtype=torch.int64).cpu().double() / pixels
    mse = difference.to(torch.int32).square().flatten(1).sum(1, dtype=torch.int64).cpu().double() / pixels
    return PixelErrors(l1, mse, psnr_of(mse))


def psnr(images: Tensor, copies: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB, float64 [B]; see :func:`pixel_errors`."""
    return pixel_errors(images, copies).psnr


def psnr_of(mse: Tensor) -> Tensor:
    """10 log10(255² / mse), float64; 0 becomes inf."""
    return 10 * torch.log10(_PEAK**2 / mse.double())


def ssim(images: Tensor, copies: Tensor) -> Tensor:
    """Structural similarity of each image, float64 [B] on the CPU: uint8 [B, C, H, W] twice, H, W >= 7.

    The settings are scikit-image's defaults, which published tokenizer evaluations use: a uniform window of
    7 x 7, sample covariances, K1 = 0.01, K2 = 0.03, L = 255, the mean over channels and over windows that lie
    within the image. Formula: Wang et al. 2004, equation 13. Raises ValueError as :func:`pixel_errors`, and
    for smaller images.
    """
    _pair(images, copies)
    if min(images.shape[2:]) < _WINDOW:
        raise ValueError(
            f"images: expected at least {_WINDOW} x {_WINDOW} pixels for SSIM, got {list(images.shape)}"
        )
    x, y = images.float(), copies.float()
    # At most 49 * 255² < 2²⁴: every sum is an integer that float32 holds exactly.
    sums = _window_sums(torch.stack([x, y, x * x, y * y, x * y])).cpu().double()
    sx, sy, sxx, syy, sxy = sums
    n = _WINDOW**2
    pairs = n * (n - 1)
    mean_product, mean_squares = sx * sy / n**2, (sx * sx + sy * sy) / n**2
    covariance = (n * sxy - sx * sy) / pairs
    variances = (n * (sxx + syy) - sx * sx - sy * sy) / pairs
    c1, c2 = (0.01 * _PEAK) ** 2, (0.03 * _PEAK) ** 2
    similarity = (2 * mean_product + c1) * (2 * covariance + c2)
    similarity /= (mean_squares + c1) * (variances + c2)
    return similarity.flatten(1).mean(1)


def _window_sums(x: Tensor) -> Tensor:
    """Sums over all windows that lie within the last two dimensions, by rows, then by columns."""
    width, height = x.shape[-1] - _WINDOW + 1, x.shape[-2] - _WINDOW + 1
    rows = x[..., :width].clone()
    for i in range(1, _WINDOW):
        rows += x[..., i : i + width]
    total = rows[..., :height, :].clone()
    for i in range(1, _WINDOW):
        total += rows[..., i : i + height, :]
    return total


def _pair(images: Tensor, copies: Tensor) -> Tensor:
    """The difference, int16, of two batches that were checked."""
    if images.dim() != 4 or images.dtype != torch.uint8 or images.shape[1] not in (1, 3):
        raise ValueError(f"images: expected uint8 [B, 1 or 3, H, W], got {images.dtype} {list(images.shape)}")
    if copies.shape != images.shape or copies.dtype != torch.uint8:
        raise ValueError(
            f"copies: expected uint8 {list(images.shape)}, got {copies.dtype} {list(copies.shape)}"
        )
    return images.to(torch.int16) - copies.to(torch.int16)
