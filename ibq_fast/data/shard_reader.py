"""Tar shards as webdataset lays them out: which there are, and the samples of one of them."""

from __future__ import annotations

import glob
import json
import lzma
import tarfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ibq_fast.data.decode import BadImageError, Fault, decode_image
from ibq_fast.data.errors import DataError
from ibq_fast.data.paths import EXTENSIONS

NO_LABEL = -1
_IMAGES = tuple(extension[1:] for extension in EXTENSIONS)


class ShardSample(NamedTuple):
    """One sample as it lies in its shard: ``files`` by extension, or ``broken``, what ended the shard."""

    key: str
    files: dict[str, bytes]
    broken: str | None = None


def find_shards(pattern: str) -> list[str]:
    """The shards that ``pattern`` names: ``train-{0000..0299}.tar``, ``train-*.tar``, URLs, ``pipe:…``.

    Several patterns are separated by ``::``. Braces are expanded everywhere, ``*``, ``?`` and ``[`` in local
    names only. What follows ``pipe:`` is run by the shell. Raises DataError when a local shard is missing,
    ValueError without the webdataset package.
    """
    found: list[str] = []
    _, expand = _webdataset()
    for name in expand(pattern):
        if ":" in name.split("/")[0]:
            found.append(name)
            continue
        matches = sorted(glob.glob(name))
        if not matches:
            raise DataError(f"{name}: expected a tar shard, got nothing of that name")
        found += matches
    return found


def read_shard(url: str) -> Iterator[ShardSample]:
    """The samples of a shard in its order: neighbouring files whose names agree up to the first dot.

    Never raises for what the shard holds: where it cannot be opened, or read any further, the last sample
    says so (``broken``; its key tells the last whole sample). A shard without samples, or without the mark
    that ends a tar file, is such a shard.
    """
    gopen, _ = _webdataset()
    key, files, whole = "", dict[str, bytes](), ""
    try:
        with gopen(url) as stream:
            for name, content in _tar_files(stream):
                stem, extension = _split(name)
                if stem != key and files:
                    yield ShardSample(key, files)
                    whole, files = key, {}
                key = stem
                files.setdefault(extension, content)
        if not files:
            raise ValueError("it holds no samples")
        yield ShardSample(key, files)
    except (OSError, EOFError, ValueError, tarfile.TarError, zlib.error, lzma.LZMAError) as error:
        where = f"(after {whole})" if whole else "(at its beginning)"
        yield ShardSample(where, {}, f"{type(error).__name__}: {error}")


def _tar_files(stream: Any) -> Iterator[tuple[str, bytes]]:
    """Name and content of the regular files, but for webdataset's own notes (``__…__``)."""
    with tarfile.open(fileobj=stream, mode="r|*") as opened:
        archive: Any = opened  # its fileobj and members are not in the type's description
        for entry in archive:
            content = archive.extractfile(entry) if entry.isreg() else None
            if content is not None and not entry.name.startswith("__"):
                yield entry.name, content.read()
            archive.members = []  # tarfile keeps them all
        # A header that is cut off counts as the end for tarfile; a whole file ends with two blocks of zeros.
        if len(archive.fileobj.read(tarfile.BLOCKSIZE)) < tarfile.BLOCKSIZE:
            raise tarfile.ReadError("it was cut off: no end mark")


def _split(name: str) -> tuple[str, str]:
    """Folders and name up to the first dot, and the extensions behind it in lower case."""
    folder, slash, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    return folder + slash + stem, extension.lower()


def decode_sample(sample: ShardSample, channels: int, max_pixels: int) -> tuple[Image.Image, int]:
    """The image and label of a sample; NO_LABEL (-1) where it has none.

    The image is the file whose extension is one of a picture; the label is the integer in ``cls``, or
    ``label`` in ``json``. Raises BadImageError.
    """
    if sample.broken is not None:
        raise BadImageError(sample.key, Fault.BROKEN_SHARD, sample.broken)
    extension = next((name for name in _IMAGES if name in sample.files), None)
    if extension is None:
        raise BadImageError(sample.key, Fault.NO_IMAGE, f"it has {sorted(sample.files)}")
    image = decode_image(
        f"{sample.key}.{extension}", channels, max_pixels=max_pixels, content=sample.files[extension]
    )
    return image, _label(sample)


def _label(sample: ShardSample) -> int:
    try:
        if "cls" in sample.files:
            label: Any = int(sample.files["cls"])
        elif "json" in sample.files:
            label = json.loads(sample.files["json"]).get("label", NO_LABEL)
        else:
            return NO_LABEL
        return int(np.int64(label))
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        raise BadImageError(sample.key, Fault.BAD_LABEL, str(error)) from error


def _webdataset() -> tuple[Callable[[str], Any], Callable[[str], list[str]]]:
    """webdataset's ``gopen``, which opens names and URLs, and ``expand_urls``."""
    try:
        from webdataset.gopen import gopen
        from webdataset.shardlists import expand_urls
    except ImportError as error:
        raise ValueError(
            f"kind: expected the webdataset package for shards (pip install 'ibq_fast[shards]'), got {error}"
        ) from error
    return gopen, expand_urls
