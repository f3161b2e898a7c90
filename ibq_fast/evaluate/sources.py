"""Sets of images by number: folders, ``.npz`` sample files, tensors, generators.

Any block of a set can be asked for at any time, which is what spreads an evaluation over processes and takes
it up again.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

from ibq_fast.data import BadImageError, DataError, decode_image
from ibq_fast.data.paths import EXTENSIONS
from ibq_fast.evaluate.resize import Resizer


class Block(NamedTuple):
    """``images`` uint8 [B, C, R, R] and their numbers ``indices`` int64 [B] in the set; what could not be
    read is left out and named in ``unreadable`` (name, reason)."""

    images: Tensor
    indices: Tensor
    unreadable: list[tuple[str, str]]


class ImageSource(Protocol):
    """A numbered set of images.

    description, digest: where they come from, and a hash of which they are; for reports and for taking up an
    evaluation. A folder's digest is of the files' names and sizes, not of their content.
    """

    description: str
    digest: str

    def __len__(self) -> int: ...

    def block(self, start: int, stop: int) -> Block:
        """Images start … stop - 1."""
        ...

    def name(self, index: int) -> str:
        """What to call image ``index`` in a report."""
        ...


class FolderSource:
    """Image files of any size, in the order of their paths, prepared by ``resize``.

    Files are decoded by ``threads`` threads (Pillow lets go of the interpreter's lock).
    """

    def __init__(
        self, files: Sequence[Path], resize: Resizer, channels: int, *, description: str, threads: int = 2
    ) -> None:
        if not files:
            raise DataError(f"images: expected image files, found none in {description}")
        self.files, self.resize, self.channels, self.description = list(files), resize, channels, description
        self._pool = ThreadPoolExecutor(max(threads, 1), thread_name_prefix="decode")
        # As one absolute path each would make the digest change when the folder is moved.
        root = os.path.commonpath([file.parent for file in self.files])
        listed = [[os.path.relpath(file, root), file.stat().st_size] for file in self.files]
        self.digest = _digest(["folder", channels, listed])

    def __len__(self) -> int:
        return len(self.files)

    def block(self, start: int, stop: int) -> Block:
        indices = range(start, min(stop, len(self)))
        read = list(self._pool.map(self._read, indices))
        good = [(i, item) for i, item in zip(indices, read, strict=True) if isinstance(item, Tensor)]
        bad = [
            (str(self.files[i]), item) for i, item in zip(indices, read, strict=True) if isinstance(item, str)
        ]
        side = self.resize.resolution
        images = torch.stack([x for _, x in good]) if good else _none(self.channels, side)
        return Block(images, torch.tensor([i for i, _ in good], dtype=torch.int64), bad)

    def name(self, index: int) -> str:
        return str(self.files[index])

    def _read(self, index: int) -> Tensor | str:
        try:
            return self.resize(decode_image(self.files[index], self.channels))
        except BadImageError as error:
            return error.fault.reason


class ArraySource:
    """uint8 images in memory or mapped, [N, H, W, 1 or 3] or (``channels_first``) [N, 1 or 3, H, W], taken as
    they are; one channel is repeated where ``channels`` is 3."""

    def __init__(
        self,
        array: np.ndarray,
        *,
        description: str,
        digest: str,
        channels: int,
        resolution: int | None = None,
        channels_first: bool = False,
    ) -> None:
        shape = (
            array.shape
            if channels_first or array.ndim != 4
            else (*array.shape[:1], array.shape[3], *array.shape[1:3])
        )
        if array.ndim != 4 or array.dtype != np.uint8 or shape[1] not in (1, 3) or not shape[0]:
            raise DataError(
                f"{description}: expected uint8 [N, H, W, 1 or 3], got {array.dtype} {array.shape}"
            )
        if shape[2] != shape[3] or resolution not in (None, shape[2]):
            wanted = (
                "square images" if resolution is None else f"images of {resolution} x {resolution} pixels"
            )
            raise DataError(f"{description}: expected {wanted}, got {shape[2]} x {shape[3]}")
        if channels != shape[1] and (shape[1], channels) != (1, 3):
            raise DataError(f"{description}: expected {channels} channels, got {shape[1]}")
        self.array, self.channels_first, self.channels = array, channels_first, channels
        self.description, self.digest = description, digest
        self.resolution = int(shape[2])

    def __len__(self) -> int:
        return len(self.array)

    def block(self, start: int, stop: int) -> Block:
        stop = min(stop, len(self))
        images = torch.from_numpy(np.array(self.array[start:stop]))
        if not self.channels_first:
            images = images.permute(0, 3, 1, 2)
        images = images.expand(-1, self.channels, -1, -1).contiguous()
        return Block(images, torch.arange(start, stop), [])

    def name(self, index: int) -> str:
        return f"{self.description}[{index}]"


def tensor_source(images: Tensor, description: str) -> ArraySource:
    """uint8 [N, C, H, H] in memory."""
    array = images.contiguous().numpy()
    digest = hashlib.sha256(array.tobytes()).hexdigest()
    return ArraySource(
        array, description=description, digest=digest, channels=images.shape[1], channels_first=True
    )


class FirstImages:
    """The first ``count`` images of ``source``."""

    def __init__(self, source: ImageSource, count: int) -> None:
        self.source, self._count = source, min(count, len(source))
        self.description = source.description
        self.digest = _digest(["first", self._count, source.digest])

    def __len__(self) -> int:
        return self._count

    def block(self, start: int, stop: int) -> Block:
        return self.source.block(start, min(stop, self._count))

    def name(self, index: int) -> str:
        return self.source.name(index)


def open_npz_images(path: Path, resolution: int | None = None, channels: int = 3) -> ArraySource:
    """The array ``arr_0``, uint8 [N, H, W, C], of a ``.npz`` file as ADM's sampling writes it, mapped rather
    than read. Raises DataError when there is none, or it is compressed."""
    array = map_npz_member(path, "arr_0")
    if array is None:
        raise DataError(f"{path}: expected an array arr_0 of images, found none")
    digest = _digest(["npz", array.shape, path.stat().st_size, _crc(path, "arr_0")])
    return ArraySource(array, description=str(path), digest=digest, channels=channels, resolution=resolution)


def map_npz_member(path: Path, name: str) -> np.ndarray | None:
    """A stored array of a ``.npz`` file as a read-only memory map; None when the file has no such array."""
    try:
        with zipfile.ZipFile(path) as archive:
            if f"{name}.npy" not in archive.namelist():
                return None
            info = archive.getinfo(f"{name}.npy")
            if info.compress_type != zipfile.ZIP_STORED:
                raise DataError(
                    f"{path}: {name} is compressed; write it with numpy.savez, so that it can be mapped"
                )
            with archive.open(info) as member:
                version = npy.read_magic(member)
                read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
                shape, fortran, dtype = read(member)
                header = member.tell()
        with path.open("rb") as file:  # the member's own header says where its bytes begin
            file.seek(info.header_offset + 26)
            lengths = np.frombuffer(file.read(4), "<u2")
        offset = info.header_offset + 30 + int(lengths.sum()) + header
    except (zipfile.BadZipFile, ValueError, OSError) as error:
        if isinstance(error, (DataError, FileNotFoundError)):
            raise
        raise DataError(f"{path}: not a readable .npz file: {error}") from error
    if dtype.hasobject:
        raise DataError(f"{path}: {name} holds Python objects, which are not read")
    return np.memmap(path, dtype, "r", offset, shape, "F" if fortran else "C")


def find_files(images: Iterable[str | Path]) -> Iterator[Path]:
    """The files among ``images``, and those with an image's name in the folders among them, sorted by path.

    Raises FileNotFoundError for a path that does not exist.
    """
    for name in images:
        path = Path(name)
        if path.is_dir():
            yield from sorted(p for p in path.rglob("*") if p.suffix.lower() in EXTENSIONS and p.is_file())
        elif path.exists():
            yield path
        else:
            raise FileNotFoundError(f"images: expected a file or a folder, got {str(path)!r}")


def _crc(path: Path, name: str) -> int:
    """The checksum of its content that a zip file carries."""
    with zipfile.ZipFile(path) as archive:
        return archive.getinfo(f"{name}.npy").CRC


def _none(channels: int, side: int) -> Tensor:
    return torch.empty(0, channels, side, side, dtype=torch.uint8)


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
