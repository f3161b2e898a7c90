"""Making image files, whole and damaged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def picture(width: int, height: int, seed: int) -> Image.Image:
    """A smooth colour picture in which no two places look alike."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / (3 + seed % 5) + k) + np.cos(y / (4 + seed % 3) - k) for k in range(3)]
    return Image.fromarray((np.stack(waves, -1) * 60 + 128).astype(np.uint8))


def truncate(path: Path) -> None:
    """Keep the first half of a file: the header is whole, the pixels are not."""
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
