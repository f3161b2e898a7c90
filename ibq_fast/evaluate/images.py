"""Pictures of reconstructions, samples and code use."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

_GAP = 2
_BACKGROUND = 255


def image_grid(images: Tensor, columns: int | None = None) -> Tensor:
    """uint8 [B,C,H,W] -> one uint8 [3,H',W'] picture, row by row, with thin white gaps.

    ``columns`` defaults to about the square root of B.
    """
    _check_images("images", images)
    count, _, height, width = images.shape
    if count == 0:
        raise ValueError("images: expected at least one, got none")
    columns = columns or math.ceil(math.sqrt(count))
    if columns < 1:
        raise ValueError(f"columns: expected at least 1, got {columns}")
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    shape = (3, rows * (height + _GAP) - _GAP, columns * (width + _GAP) - _GAP)
    grid = torch.full(shape, _BACKGROUND, dtype=torch.uint8)
    for i, image in enumerate(images.cpu()):
        top, left = i // columns * (height + _GAP), i % columns * (width + _GAP)
        grid[:, top : top + height, left : left + width] = image  # one channel spreads over three
    return grid


def reconstruction_grid(images: Tensor, reconstructions: Tensor, columns: int = 8) -> Tensor:
    """Originals above their reconstructions, ``columns`` pairs to a band: uint8 [B,C,H,W] twice -> uint8
    [3,H',W'].
    """
    _check_images("images", images)
    _check_images("reconstructions", reconstructions)
    if images.shape != reconstructions.shape:
        raise ValueError(f"reconstructions: expected {list(images.shape)}, got {list(reconstructions.shape)}")
    columns = min(columns, len(images))
    bands = []
    for start in range(0, len(images), columns):
        for part in (images, reconstructions):
            band = part[start : start + columns].cpu()
            missing = columns - len(band)
            blank = torch.full((missing, *band.shape[1:]), _BACKGROUND, dtype=torch.uint8)
            bands.append(torch.cat([band, blank]))
    return image_grid(torch.cat(bands), columns)


def save_png(image: Tensor, path: str | Path) -> Path:
    """Write a uint8 [1 or 3,H,W] picture as PNG; the folder is made."""
    if image.dim() != 3 or image.dtype != torch.uint8 or image.shape[0] not in (1, 3):
        raise ValueError(f"image: expected uint8 [1 or 3, H, W], got {image.dtype} {list(image.shape)}")
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    pixels = image.cpu().permute(1, 2, 0).contiguous().numpy()
    Image.fromarray(pixels[..., 0] if image.shape[0] == 1 else pixels).save(target)
    return target


def usage_plot(counts: Tensor, path: str | Path, title: str = "") -> Path:
    """Plot how often each code was used, most used first, as PNG: ``counts`` int64 [K]."""
    if counts.dim() != 1 or counts.is_floating_point():
        raise ValueError(f"counts: expected int64 [K], got {counts.dtype} {list(counts.shape)}")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    ordered = np.sort(counts.cpu().numpy())[::-1]
    used = int((ordered > 0).sum())
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.fill_between(np.arange(len(ordered)), ordered, step="mid", color="#33658a")
    axes.axhline(float(ordered.mean()), color="#f26419", linewidth=1, label="all codes used alike")
    axes.set(xlabel="code, most used first", ylabel="times used", xlim=(0, max(len(ordered) - 1, 1)))
    axes.set_yscale("symlog", linthresh=1)
    axes.set_title(f"{title + ': ' if title else ''}{used} of {len(ordered)} codes used")
    axes.legend(frameon=False)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=120)
    return target


def _check_images(name: str, images: Tensor) -> None:
    if images.dim() != 4 or images.dtype != torch.uint8 or images.shape[1] not in (1, 3):
        raise ValueError(f"{name}: expected uint8 [B, 1 or 3, H, W], got {images.dtype} {list(images.shape)}")
