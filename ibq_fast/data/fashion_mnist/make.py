"""Make the embedded subset of Fashion-MNIST from the four original ``.gz`` files.

    python -m ibq_fast.data.fashion_mnist.make /usr/share/datasets/fashion-mnist

The first ``TRAIN_PER_CLASS`` and ``TEST_PER_CLASS`` images of every class are taken, in the order of the
source's training and test split: nothing is drawn at random, so the result is the same on every machine
(for one version of liblzma; the pixels are the same for any).

Layout of a split's file: an xz stream of uint8 ``[class, image, column, row]``. Bytes per image, measured on
4,000 images: columns before rows and plain LZMA 355; rows first 372; PNG 391, WebP (lossless) 367 and
JPEG 2000 495, all on mosaics; LZMA after a MED, up or left predictor 382 to 407.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import lzma
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

TRAIN_PER_CLASS = 1400  # 14,000 images: the most that leaves a margin below 6 MB
TEST_PER_CLASS = 200
NUM_CLASSES = 10

# File name -> sha256 of what is inside the gzip: the outside differs between Debian and the original site.
SOURCES = {
    "train-images-idx3-ubyte.gz": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte.gz": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte.gz": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte.gz": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}


def make(source: Path, out: Path) -> dict[str, object]:
    """Read the four files in ``source``, write ``train.xz``, ``test.xz`` and ``manifest.json`` to ``out``.

    Returns the manifest. Raises ValueError for a source file that is not the one this script was written for.
    """
    splits = {}
    for name, prefix, per_class in (("train", "train", TRAIN_PER_CLASS), ("test", "t10k", TEST_PER_CLASS)):
        images = read_idx(source / f"{prefix}-images-idx3-ubyte.gz")
        labels = read_idx(source / f"{prefix}-labels-idx1-ubyte.gz")
        chosen = np.stack([images[labels == c][:per_class] for c in range(NUM_CLASSES)])
        pixels = chosen.transpose(0, 1, 3, 2).tobytes()
        packed = lzma.compress(
            pixels,
            format=lzma.FORMAT_XZ,
            check=lzma.CHECK_CRC32,
            filters=[{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 4, "lp": 0, "pb": 0}],
        )
        (out / f"{name}.xz").write_bytes(packed)
        splits[name] = {
            "images_per_class": per_class,
            "bytes": len(packed),
            "sha256": hashlib.sha256(packed).hexdigest(),
            "pixels_sha256": hashlib.sha256(pixels).hexdigest(),
        }
    manifest: dict[str, object] = {
        "num_classes": NUM_CLASSES,
        "side": 28,
        "splits": splits,
        "sources": SOURCES,
    }
    (out / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    return manifest


def read_idx(path: Path) -> NDArray[np.uint8]:
    """The uint8 array in a gzipped IDX file: bytes 0, 0, 8, rank, the sizes (big-endian int32), the data."""
    raw = gzip.decompress(path.read_bytes())
    found = hashlib.sha256(raw).hexdigest()
    if found != SOURCES[path.name]:
        raise ValueError(f"{path}: expected content of sha256 {SOURCES[path.name]}, got {found}")
    rank = raw[3]
    shape = np.frombuffer(raw, ">i4", count=rank, offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(shape)


def main() -> int:
    parser = argparse.ArgumentParser(description="Make the embedded subset of Fashion-MNIST.")
    parser.add_argument("source", type=Path, help="folder with the four idx.gz files")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent, help="where to write (this folder)"
    )
    args = parser.parse_args()
    sys.stdout.write(json.dumps(make(args.source, args.out), indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
