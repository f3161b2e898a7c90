"""From the words of a command line to what an evaluation is called with: processes, images, references."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image

from ibq_fast.data import DataError, fashion_mnist
from ibq_fast.evaluate.devices import pick_device
from ibq_fast.evaluate.generator import Reference
from ibq_fast.evaluate.protocols import Protocol, Resize
from ibq_fast.evaluate.resize import Resizer
from ibq_fast.evaluate.sources import (
    ArraySource,
    FolderSource,
    ImageSource,
    find_files,
    map_npz_member,
    open_npz_images,
    tensor_source,
)
from ibq_fast.evaluate.statistics import load_statistics
from ibq_fast.evaluate.trunks import sha256_of

EMBEDDED = "fashion_mnist"


@contextmanager
def processes(device: str) -> Iterator[torch.device]:
    """This process's device; connected with the others while inside, where torchrun started several.

    Only words and moments of waiting are exchanged, by Gloo: measurements go through the output folder.
    """
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    place = pick_device(device)
    if several and place.type != "cpu" and place.index is None:
        place = torch.device(place.type, int(os.environ.get("LOCAL_RANK", "0")))
    if several:
        dist.init_process_group("gloo", timeout=timedelta(days=1))
    try:
        yield place
    finally:
        if several:
            dist.destroy_process_group()


def open_images(
    words: Sequence[str | Path], resolution: int, resize: Resize, channels: int, threads: int = 2
) -> ImageSource:
    """Image files and folders, one ``.npz`` file of images, or ``fashion_mnist``, the embedded held-out
    images.

    Raises FileNotFoundError and DataError as what they are read by.
    """
    one = str(words[0]) if len(words) == 1 else ""
    if one == EMBEDDED:
        images = fashion_mnist("test", channels=channels).images
        source = tensor_source(
            images.expand(-1, channels, -1, -1), "Fashion-MNIST, the embedded held-out images"
        )
        if source.resolution != resolution:
            raise DataError(
                f"{EMBEDDED}: expected a resolution of {source.resolution} pixels, got {resolution}"
            )
        return source
    if one.endswith(".npz"):
        return open_npz_images(Path(one), resolution, channels)
    files = list(find_files(words))
    described = ", ".join(map(str, words))
    return FolderSource(files, Resizer(resolution, resize), channels, description=described, threads=threads)


def open_samples(path: Path, resolution: int | None, threads: int = 2) -> tuple[ImageSource, int]:
    """Generated images, ``.npz`` or a folder, taken as they are, and their side: ``resolution``, or what the
    first of them has."""
    if path.suffix == ".npz":
        array: ArraySource = open_npz_images(path, resolution)
        return array, array.resolution
    files = list(find_files([path]))
    if resolution is None:
        if not files:
            raise DataError(f"images: expected image files, found none in {path}")
        with Image.open(files[0]) as first:
            resolution = first.width
    source = FolderSource(files, Resizer(resolution, "none"), 3, description=str(path), threads=threads)
    return source, resolution


def open_reference(words: Sequence[str | Path], protocol: Protocol, threads: int = 2) -> Reference:
    """Images as :func:`open_images`; or a ``.npz`` file of statistics, with images (ADM's reference batches)
    or without."""
    assert protocol.resolution is not None
    path = Path(words[0])
    if len(words) == 1 and path.suffix == ".npz":
        statistics = load_statistics(path)
        has_images = map_npz_member(path, "arr_0") is not None
        images = open_npz_images(path, protocol.resolution) if has_images else None
        if statistics is None and images is None:
            raise DataError(f"{path}: expected statistics (mu, sigma) or images (arr_0), found neither")
        return Reference(images, statistics, str(path), sha256_of(path))
    return Reference(open_images(words, protocol.resolution, protocol.resize, 3, threads))
