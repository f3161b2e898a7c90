"""Small folders of real image files, made for each test."""

from __future__ import annotations

from pathlib import Path

import pytest
from pictures import picture, truncate

SIZES = [(24, 24), (40, 20), (17, 33), (21, 48)]
SUFFIXES = [".png", ".jpg", ".webp", ".png"]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three classes of eight good images each, of four sizes and three formats."""
    root = tmp_path / "photos"
    for label, name in enumerate(["ant", "bee", "cat"]):
        folder = root / name
        folder.mkdir(parents=True)
        for i in range(8):
            image = picture(*SIZES[i % 4], seed=8 * label + i)
            image.save(folder / f"{i:02}{SUFFIXES[i % 4]}")
    return root


@pytest.fixture
def damaged(photos: Path) -> tuple[Path, set[Path]]:
    """The same folder with four bad files among its 24, and their paths."""
    truncated_png, empty, text, truncated_jpg = (
        photos / "ant" / "00.png",
        photos / "bee" / "02.webp",
        photos / "cat" / "01.jpg",
        photos / "cat" / "05.jpg",
    )
    truncate(truncated_png)
    truncate(truncated_jpg)
    empty.write_bytes(b"")
    text.write_text("not a picture\n")
    return photos, {truncated_png, empty, text, truncated_jpg}
