"""From an image file to 8-bit pixels, whatever the file holds; what cannot be read says why."""

from __future__ import annotations

import enum
import io
import os
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

MAX_PIXELS = 89_478_485  # Pillow's own threshold of suspicion: a quarter of a gigabyte as RGB
_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Fault(enum.IntEnum):
    """Why an image is bad. Small integers, since workers report them through one shared byte per image."""

    UNREADABLE = 1
    EMPTY = 2
    NOT_AN_IMAGE = 3
    CORRUPT = 4
    TOO_LARGE = 5
    UNSUPPORTED = 6
    NO_IMAGE = 7
    BAD_LABEL = 8
    BROKEN_SHARD = 9

    @property
    def reason(self) -> str:
        """The fault in words."""
        return _REASONS[self]


_REASONS = {
    Fault.UNREADABLE: "the file cannot be opened (missing, or no permission)",
    Fault.EMPTY: "the file is empty",
    Fault.NOT_AN_IMAGE: "not an image, or not of a format that Pillow knows",
    Fault.CORRUPT: "truncated or corrupt",
    Fault.TOO_LARGE: "more pixels than max_pixels (a decompression bomb?)",
    Fault.UNSUPPORTED: "pixel type not supported (floating point, 32-bit integer, Lab)",
    Fault.NO_IMAGE: "the sample has no image file",
    Fault.BAD_LABEL: "the label is not an integer",
    Fault.BROKEN_SHARD: "the shard cannot be read to its end",
}


class BadImageError(ValueError):
    """One image that cannot be used: ``path``, ``fault`` and ``detail``, the decoder's own words."""

    def __init__(self, path: str | Path, fault: Fault, detail: str) -> None:
        super().__init__(f"{path}: {fault.reason}: {detail}" if detail else f"{path}: {fault.reason}")
        self.path, self.fault, self.detail = str(path), fault, detail


def decode_image(
    path: str | Path, channels: int, *, max_pixels: int = MAX_PIXELS, content: bytes | None = None
) -> Image.Image:
    """The first frame of an image file, upright, as mode "L" (``channels`` 1) or "RGB" (3).

    ``content``: the file's bytes, where it is no file of its own; ``path`` is then only its name.

    EXIF orientation is applied; transparency is laid over white; 16-bit grey is scaled to 8 bits; palette,
    bilevel and CMYK are converted; RGB becomes grey by the ITU-R 601 luma. The size is checked against
    ``max_pixels`` before any pixel is decoded.

    Raises BadImageError, and nothing else, for a file that cannot be used; MemoryError passes through.
    """
    try:
        with warnings.catch_warnings():
            # Of large images, refused below in our own words, and of odd metadata, which is not used.
            warnings.simplefilter("ignore")
            with Image.open(path if content is None else io.BytesIO(content)) as image:
                if image.width * image.height > max_pixels:
                    size = f"{image.width} x {image.height} > {max_pixels:,}"
                    raise BadImageError(path, Fault.TOO_LARGE, size)
                image.load()
                return _eight_bit(_upright(image), channels, path)
    except (BadImageError, MemoryError):
        raise
    except Exception as error:
        # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, zlib.error, … on bad bytes.
        # Of a file that is none of an image Pillow says only that.
        detail = "" if isinstance(error, UnidentifiedImageError) else str(error)
        raise BadImageError(path, _classify(path, content, error), detail) from error


def _classify(path: str | Path, content: bytes | None, error: Exception) -> Fault:
    if isinstance(error, Image.DecompressionBombError):
        return Fault.TOO_LARGE
    if isinstance(error, OSError) and error.errno is not None:
        return Fault.UNREADABLE
    if (os.stat(path).st_size if content is None else len(content)) == 0:
        return Fault.EMPTY
    return Fault.NOT_AN_IMAGE if isinstance(error, UnidentifiedImageError) else Fault.CORRUPT


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:
        orientation = 1  # damaged metadata beside good pixels: the pixels count
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _eight_bit(image: Image.Image, channels: int, path: str | Path) -> Image.Image:
    mode = "L" if channels == 1 else "RGB"
    if image.mode.startswith("I"):
        image = _from_sixteen_bit(image, path)
    elif image.mode in ("F", "LAB"):
        raise BadImageError(path, Fault.UNSUPPORTED, f"Pillow mode {image.mode}")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)


def _from_sixteen_bit(image: Image.Image, path: str | Path) -> Image.Image:
    """Modes I;16, I;16B, I;16L and I (16-bit grey in older Pillow). ``convert("L")`` would clip at 255."""
    wide = np.asarray(image).astype(np.int64)
    if wide.size and not 0 <= wide.min() <= wide.max() <= 65535:
        raise BadImageError(path, Fault.UNSUPPORTED, f"integers from {wide.min()} to {wide.max()}")
    return Image.fromarray(((wide + 128) // 257).astype(np.uint8))
