"""Finding the images below ``root/class/`` and keeping their paths in two flat arrays."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ibq_fast.data.errors import DataError

EXTENSIONS = (
    ".jpg",
    ".jpeg",
    ".png",
    ".webp",
    ".bmp",
    ".gif",
    ".tif",
    ".tiff",
    ".jp2",
    ".avif",
    ".ppm",
    ".pgm",
)
Part = Literal["all", "train", "val"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImagePaths:
    """Paths and labels of a folder of classes, in sorted order.

    The paths are one block of bytes with offsets: a list of a million strings would be copied into every
    worker, page by page, as their reference counts are touched.

    Args:
        root: the folder that holds the class folders.
        classes: names of the class folders, sorted.
        labels: int64 [N].
        blob, offsets: path i, relative to root, is ``blob[offsets[i]:offsets[i + 1]]``; uint8, int64 [N + 1].
    """

    root: Path
    classes: tuple[str, ...]
    labels: NDArray[np.int64]
    blob: NDArray[np.uint8]
    offsets: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Path:
        start, stop = self.offsets[index], self.offsets[index + 1]
        return self.root / os.fsdecode(self.blob[start:stop].tobytes())


def find_images(
    root: str | Path,
    *,
    classes: Sequence[str] | None = None,
    part: Part = "all",
    val_fraction: float = 0.0,
) -> ImagePaths:
    """List ``root/class/**/*.jpg`` (and the other ``EXTENSIONS``), hidden entries left out.

    Args:
        root: folder of class folders; a class folder may be a link, and may hold folders of images.
        classes: class names in label order; by default the sorted folder names. A folder that is not among
            them is an error, a name without a folder is a class without images.
        part: "val" keeps about ``val_fraction`` of the images, "train" the others. Which is which follows
            from a hash of the path below ``root`` alone, so it survives moving the folder or adding images.
        val_fraction: share of the images held out, in [0, 1).

    Raises DataError when ``root`` is missing, no folder, or holds no classes or no images of this part.
    """
    if not 0.0 <= val_fraction < 1.0:
        raise ValueError(f"val_fraction: expected a share in [0, 1), got {val_fraction}")
    root = Path(root)
    names = class_folders(root)
    if classes is not None:
        unknown = sorted(set(names) - set(classes))
        if unknown:
            raise DataError(
                f"{root}: expected class folders of the training set only, got also {unknown[:5]}"
            )
        names = tuple(classes)
    paths: list[bytes] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        found = sorted(_relative_image_paths(root, name))
        if not found:
            _log.warning("%s: class %r has no images", root, name)
        chosen = [path for path in found if part == "all" or (part == "val") == _held_out(path, val_fraction)]
        paths += chosen
        labels += [label] * len(chosen)
    if not paths:
        which = "" if part == "all" else f' for part "{part}" (val_fraction {val_fraction})'
        raise DataError(
            f"{root}: no images{which} in {len(names)} class folders; looked for {', '.join(EXTENSIONS)}"
        )
    offsets = np.concatenate([[0], np.cumsum([len(path) for path in paths])]).astype(np.int64)
    blob = np.frombuffer(b"".join(paths), np.uint8)
    return ImagePaths(root, names, np.asarray(labels, np.int64), blob, offsets)


def class_folders(root: str | Path) -> tuple[str, ...]:
    """The sorted names of the class folders in ``root``, hidden ones left out.

    Raises DataError when ``root`` is missing, no folder, empty, or has no folders in it.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(
            f"{root}: expected a folder of class folders, got {'a file' if root.exists() else 'nothing'}"
        )
    entries = [entry for entry in root.iterdir() if not entry.name.startswith(".")]
    folders = sorted(entry.name for entry in entries if entry.is_dir())
    if not entries:
        raise DataError(
            f"{root}: expected class folders with images (root/class/name.jpg), got an empty folder"
        )
    if not folders:
        raise DataError(
            f"{root}: expected class folders (root/class/name.jpg), got {len(entries)} files and no folder; "
            "put all images into one folder below it if they have no classes"
        )
    return tuple(folders)


def _relative_image_paths(root: Path, name: str) -> list[bytes]:
    found = []
    for folder, below, files in os.walk(root / name):
        below[:] = [entry for entry in below if not entry.startswith(".")]
        for file in files:
            if file.lower().endswith(EXTENSIONS) and not file.startswith("."):
                found.append(os.fsencode(os.path.relpath(os.path.join(folder, file), root)))
    return found


def _held_out(path: bytes, val_fraction: float) -> bool:
    digest = hashlib.blake2b(path.replace(os.sep.encode(), b"/"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < val_fraction * 2.0**64
