"""The embedded subset of Fashion-MNIST (provenance and licence: README.md and LICENSE in this folder)."""

from __future__ import annotations

import hashlib
import json
import lzma
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import pad

from ibq_fast.data.errors import DataError
from ibq_fast.data.in_memory import InMemoryImages

CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
RESOLUTION = 32  # 28 and a border of two black pixels: every usual downsampling factor divides it
_HERE = Path(__file__).parent


def fashion_mnist(
    split: str, *, channels: int = 1, flip: bool = False, seed: int = 0, folder: Path = _HERE
) -> InMemoryImages:
    """14,000 training or 2,000 held-out images, class-balanced, grey, 32 by 32 (28 by 28 and a black border).

    Item i is of class i mod 10, so any prefix whose length is a multiple of ten is balanced too.

    Args:
        split: "train" or "test".
        channels: 1, or 3 (the grey channel three times).
        flip: mirror at random, decided by (seed, epoch, index).
        seed: of the flips.
        folder: where ``manifest.json``, ``train.xz`` and ``test.xz`` lie.

    Raises ValueError for an unknown split and DataError when a file is missing or its checksum is wrong.
    """
    if split not in ("train", "test"):
        raise ValueError(f'split: expected "train" or "test", got {split!r}')
    classes_first = _pixels(split, folder)
    images = torch.from_numpy(np.ascontiguousarray(classes_first.transpose(1, 0, 3, 2))).reshape(
        -1, 1, 28, 28
    )
    labels = torch.arange(len(CLASSES)).repeat(classes_first.shape[1])
    border = (RESOLUTION - 28) // 2
    return InMemoryImages(pad(images, [border] * 4), labels, CLASSES, channels=channels, flip=flip, seed=seed)


def _pixels(split: str, folder: Path) -> np.ndarray:
    """uint8 [class, image, column, row], as make.py stores it."""
    path = folder / f"{split}.xz"
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        expected = manifest["splits"][split]
        packed = path.read_bytes()
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"fashion_mnist: the embedded data set in {folder} cannot be read: {error}"
        ) from error
    found = hashlib.sha256(packed).hexdigest()
    if found != expected["sha256"]:
        raise DataError(
            f"{path}: damaged: expected {expected['bytes']} bytes of sha256 {expected['sha256']}, "
            f"got {len(packed)} bytes of {found}. Fetch the file again, or remake it with make.py beside it."
        )
    shape = (len(CLASSES), expected["images_per_class"], 28, 28)
    return np.frombuffer(lzma.decompress(packed), np.uint8).reshape(shape)
