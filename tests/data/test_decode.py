"""Any common image file becomes upright 8-bit pixels; any other is refused with its reason."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pictures import picture, truncate
from PIL import Image

from ibq_fast.data import BadImageError, Fault, decode_image


def _palette(transparent: bool) -> Image.Image:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    if transparent:
        image.info["transparency"] = 1
    return image


# name -> (image, suffix, pixel expected in RGB); lossy formats may be a few levels off
MODES: dict[str, tuple[Callable[[], Image.Image], str, tuple[int, int, int]]] = {
    "grey": (lambda: Image.new("L", (4, 4), 77), ".png", (77, 77, 77)),
    "bilevel": (lambda: Image.new("1", (4, 4), 1), ".png", (255, 255, 255)),
    "16-bit grey, half": (
        lambda: Image.fromarray(np.full((4, 4), 32768, np.uint16)),
        ".png",
        (128, 128, 128),
    ),
    "16-bit grey, dark": (lambda: Image.fromarray(np.full((4, 4), 514, np.uint16)), ".png", (2, 2, 2)),
    "16-bit grey tiff": (lambda: Image.fromarray(np.full((4, 4), 65535, np.uint16)), ".tif", (255, 255, 255)),
    "palette": (lambda: _palette(False), ".png", (200, 100, 50)),
    "palette, transparent": (lambda: _palette(True), ".png", (255, 255, 255)),
    "rgba, transparent": (lambda: Image.new("RGBA", (4, 4), (9, 9, 9, 0)), ".png", (255, 255, 255)),
    "rgba, half": (lambda: Image.new("RGBA", (4, 4), (0, 0, 0, 128)), ".png", (127, 127, 127)),
    "grey and alpha": (lambda: Image.new("LA", (4, 4), (9, 0)), ".png", (255, 255, 255)),
    "cmyk jpeg": (lambda: Image.new("CMYK", (16, 16), (0, 255, 255, 0)), ".jpg", (255, 0, 0)),
    "gif": (lambda: Image.new("L", (4, 4), 50), ".gif", (50, 50, 50)),
    "webp with alpha": (lambda: Image.new("RGBA", (8, 8), (0, 0, 0, 0)), ".webp", (255, 255, 255)),
}


@pytest.mark.parametrize("name", MODES)
def test_pixel_types(name: str, tmp_path: Path) -> None:
    make, suffix, expected = MODES[name]
    path = tmp_path / f"image{suffix}"
    make().save(path)
    colour = np.asarray(decode_image(path, 3))
    grey = np.asarray(decode_image(path, 1))
    assert colour.shape == (*grey.shape, 3)
    assert colour.dtype == grey.dtype == np.uint8
    np.testing.assert_allclose(colour[1, 1].astype(int), expected, atol=2)
    luma = np.dot(expected, (0.299, 0.587, 0.114))
    np.testing.assert_allclose(int(grey[1, 1]), luma, atol=2)


# What a camera stores for each orientation: the inverse of what a viewer has to do.
STORED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: a.transpose(1, 0, 2)[::-1],
    7: lambda a: a.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda a: a.transpose(1, 0, 2)[:, ::-1],
}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("suffix", [".png", ".webp"])
def test_exif_orientation(orientation: int, suffix: str, tmp_path: Path) -> None:
    upright = np.asarray(picture(20, 12, seed=1))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"photo{suffix}"
    stored = np.ascontiguousarray(STORED[orientation](upright))
    Image.fromarray(stored).save(path, exif=exif, lossless=True)
    np.testing.assert_array_equal(np.asarray(decode_image(path, 3)), upright)


@pytest.mark.filterwarnings("error")
def test_damaged_exif_does_not_cost_the_image(tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    picture(20, 12, seed=1).save(path, exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff\x00")
    assert decode_image(path, 3).size == (20, 12)


def _header_only(path: Path, width: int, height: int) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    )


def _bad_checksum(path: Path) -> None:
    picture(30, 30, 0).save(path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


def _truncated(path: Path) -> None:
    picture(60, 60, 0).save(path)
    truncate(path)


FAULTS: dict[str, tuple[str, Callable[[Path], object], Fault]] = {
    "truncated png": ("a.png", _truncated, Fault.CORRUPT),
    "truncated jpeg": ("a.jpg", _truncated, Fault.CORRUPT),
    "truncated webp": ("a.webp", _truncated, Fault.CORRUPT),
    "png with a wrong byte": ("a.png", _bad_checksum, Fault.CORRUPT),
    "zero bytes": ("a.jpg", lambda path: path.write_bytes(b""), Fault.EMPTY),
    "text": ("a.jpg", lambda path: path.write_text("hello\n"), Fault.NOT_AN_IMAGE),
    "missing": ("a.jpg", lambda path: None, Fault.UNREADABLE),
    "a folder": ("a.jpg", lambda path: path.mkdir(), Fault.UNREADABLE),
    "more pixels than max_pixels": ("a.png", lambda path: picture(101, 100, 0).save(path), Fault.TOO_LARGE),
    "bomb by Pillow's warning": ("a.png", lambda path: _header_only(path, 10_000, 10_000), Fault.TOO_LARGE),
    "bomb by Pillow's error": ("a.png", lambda path: _header_only(path, 60_000, 60_000), Fault.TOO_LARGE),
    "float tiff": ("a.tif", lambda path: Image.new("F", (4, 4), 0.5).save(path), Fault.UNSUPPORTED),
}


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.filterwarnings("error")
def test_unusable_files_say_why(name: str, tmp_path: Path) -> None:
    file, make, fault = FAULTS[name]
    path = tmp_path / file
    make(path)
    with pytest.raises(BadImageError) as caught:
        decode_image(path, 3, max_pixels=10_000)
    assert caught.value.fault is fault
    assert str(caught.value).startswith(f"{path}: {fault.reason}")


def test_too_large_names_size_and_limit(tmp_path: Path) -> None:
    _header_only(tmp_path / "a.png", 5000, 4000)
    with pytest.raises(BadImageError, match=r"5000 x 4000 > 1,000,000"):
        decode_image(tmp_path / "a.png", 3, max_pixels=1_000_000)
