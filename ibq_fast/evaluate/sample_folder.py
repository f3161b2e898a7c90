"""The output folder of a sampling run: every image knows which run it belongs to, and the run is resumed by
looking at what is there.

``run.json`` holds the run's settings. Each PNG carries a text chunk with a hash of the settings and the
number of its image, and PNG has a checksum of its own in every chunk: an image counts as done when its file
is whole and says that it is this image of this run. So there is no second record that could disagree with
the files. Files appear under their name whole or not at all (written beside and renamed).
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin
from torch import Tensor

SETTINGS_FILE = "run.json"
_KEY = "ibq_fast"
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class SampleFolder:
    """``per_class`` images of each of ``classes`` below ``path``: image i is number i % per_class of class
    ``classes[i // per_class]``.

    ``settings`` (what JSON can hold) decide every pixel of the run. Raises ValueError when the folder holds a
    run with other settings, naming those that differ.
    """

    def __init__(
        self, path: str | Path, classes: Sequence[int], per_class: int, settings: Mapping[str, Any]
    ) -> None:
        self.path = Path(path)
        self.classes = list(classes)
        self.per_class = per_class
        self.settings = {"classes": self.classes, "per_class": per_class, **settings}
        text = json.dumps(self.settings, sort_keys=True)
        self.run = hashlib.blake2b(text.encode(), digest_size=12).hexdigest()
        self.settings_readable = True
        """False when ``run.json`` was there and could not be read."""
        self._compare()

    def __len__(self) -> int:
        """Number of images of the run."""
        return len(self.classes) * self.per_class

    def file(self, image: int) -> Path:
        """Where image ``image`` is."""
        label = self.classes[image // self.per_class]
        return self.path / f"class{label:04d}_{image % self.per_class:05d}.png"

    def write_settings(self) -> None:
        """Write ``run.json``: one process's task, before its first image."""
        self.path.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"run": self.run, "settings": self.settings}, indent=2) + "\n"
        write_whole(self.path / SETTINGS_FILE, text.encode())

    def write(self, image: int, pixels: Tensor) -> Path:
        """Write image ``image``, uint8 [1 or 3, H, W]. Raises OSError, saying how to go on, when the disk is
        full."""
        array = pixels.cpu().permute(1, 2, 0).contiguous().numpy()
        info = PngImagePlugin.PngInfo()
        info.add_text(_KEY, self._label(image))
        data = io.BytesIO()
        Image.fromarray(array[..., 0] if array.shape[2] == 1 else array).save(data, "PNG", pnginfo=info)
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            return write_whole(self.file(image), data.getvalue())
        except OSError as error:
            if error.errno not in _FULL:
                raise
            raise OSError(
                error.errno,
                f"{error.strerror}; make room and give the same command again to go on",
                str(self.path),
            ) from error

    def has(self, image: int) -> bool:
        """Whether image ``image`` is there and whole. Raises ValueError when its file is another run's."""
        file = self.file(image)
        if not file.exists():
            return False
        label = read_label(file)
        if label is None:
            return False
        if label != self._label(image):
            raise ValueError(
                f"out: expected a new folder, or a run's with these settings, but {file} is not of this run"
            )
        return True

    def pixels(self, image: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Image ``image`` as uint8 [H, W, 3]; grey images have three equal channels."""
        with Image.open(self.file(image)) as picture:
            return np.asarray(picture.convert("RGB"))

    def sweep(self) -> None:
        """Remove what killed processes left half written; for a run that is complete."""
        for file in self.path.glob(".*.tmp"):
            file.unlink(missing_ok=True)

    def _label(self, image: int) -> str:
        return f"{self.run} {image}"

    def _compare(self) -> None:
        file = self.path / SETTINGS_FILE
        if not file.exists():
            return
        try:
            found = json.loads(file.read_text())["settings"]
            there = {str(key): value for key, value in found.items()}
        except (ValueError, KeyError, TypeError, AttributeError, UnicodeDecodeError):
            self.settings_readable = False  # the images say for themselves what they belong to
            return
        wanted = json.loads(json.dumps(self.settings))
        differing = [name for name in {**wanted, **there} if wanted.get(name) != there.get(name)]
        if differing:
            raise ValueError(
                f"out: expected a new folder, or the settings in {file}, but "
                + "; ".join(
                    f"{name} is {_short(there.get(name))} there, {_short(wanted.get(name))} here"
                    for name in differing
                )
            )


def read_label(file: Path) -> str | None:
    """The run and number that a PNG of a run carries, "" for another whole PNG; None for a file that is not
    whole: cut off, a wrong checksum, bytes behind its end."""
    data = file.read_bytes()
    if not data.startswith(_SIGNATURE):
        return None
    at, label = len(_SIGNATURE), ""
    while at + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        end = at + 12 + length
        if end > len(data) or struct.unpack_from(">I", data, end - 4)[0] != zlib.crc32(kind + body):
            return None
        if kind == b"tEXt" and body.startswith(_KEY.encode() + b"\0"):
            label = body[len(_KEY) + 1 :].decode("latin-1")
        if kind == b"IEND":
            return label if end == len(data) else None
        at = end
    return None


def write_whole(path: Path, data: bytes) -> Path:
    """Write a file that appears whole or not at all when the process is killed, and nothing on an error."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        beside.write_bytes(data)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    return path


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
