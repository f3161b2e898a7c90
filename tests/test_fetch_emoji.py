"""The emoji script without a network: a package of three pictures, laid out, and what it refuses."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import sys
import tarfile
from pathlib import Path

import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import fetch_emoji

from ibq_fast.data import DataConfig, build_dataset

TONES = {"1F3FB": {"image": "wave-1f3fb.png", "has_img_google": True}}
EMOJI = [
    {"unified": "1F44B", "image": "wave.png", "category": "People & Body", "skin_variations": TONES},
    {"unified": "1F34E", "image": "apple.png", "category": "Food & Drink"},
    {"unified": "1F311", "image": "none.png", "category": "Symbols", "has_img_google": False},
]


def _png(side: int = 64) -> bytes:
    """Left half transparent black, right half opaque red."""
    image = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    image.paste((255, 0, 0, 255), (side // 2, 0, side, side))
    file = io.BytesIO()
    image.save(file, "png")
    return file.getvalue()


def _package(path: Path, picture: bytes) -> str:
    """Write a package; its digest."""
    emoji = [{"has_img_google": True, **entry} for entry in EMOJI]
    files = {"emoji.json": json.dumps(emoji).encode(), "LICENSE": b"MIT", "README.md": b"Apache"}
    for name in ("wave.png", "wave-1f3fb.png", "apple.png"):
        files[f"img/google/64/{name}"] = picture
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()


def test_pictures_are_laid_out_on_white_with_their_licence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch_emoji, "HELD_OUT", 0.0)
    digest = _package(tmp_path / "package.tgz", _png())
    counts = fetch_emoji.unpack(tmp_path / "package.tgz", tmp_path / "emoji", digest)
    assert counts == {"train": 3, "val": 0}
    found = {str(path.relative_to(tmp_path / "emoji")) for path in (tmp_path / "emoji").rglob("*.*")}
    assert found == {
        "README.md",
        "train/people_body/wave.png",
        "train/people_body/wave-1f3fb.png",
        "train/food_drink/apple.png",
    }
    assert (tmp_path / "emoji" / "LICENSE").read_text() == "MIT"
    config = DataConfig(root=str(tmp_path / "emoji" / "train"), val_fraction=0.5, resolution=64, flip=False)
    image = build_dataset(config, "train")[0][0]
    assert image[:, 0, 0].tolist() == [255, 255, 255]
    assert image[:, 0, 63].tolist() == [255, 0, 0]


def test_variants_of_one_emoji_are_on_one_side() -> None:
    """Whatever the split, which is a hash's: about a tenth of the emoji is held out."""
    emoji = [
        {"unified": f"{i:X}", "image": f"{i}.png", "category": "Flags", "has_img_google": True,
         "skin_variations": {"tone": {"image": f"{i}-tone.png", "has_img_google": True}}}
        for i in range(2000)
    ]  # fmt: skip
    parts: dict[str, set[str]] = {"train": set(), "val": set()}
    for part, folder, name in fetch_emoji.pictures(emoji):
        assert folder == "flags"
        parts[part].add(name.removesuffix(".png").removesuffix("-tone"))
    assert not parts["train"] & parts["val"]
    assert 140 < len(parts["val"]) < 260


def test_another_package_and_another_size_are_refused(tmp_path: Path) -> None:
    archive = tmp_path / "package.tgz"
    digest = _package(archive, _png(32))
    with pytest.raises(ValueError, match="expected sha512"):
        fetch_emoji.unpack(archive, tmp_path / "emoji")
    with pytest.raises(ValueError, match="64 x 64"):
        fetch_emoji.unpack(archive, tmp_path / "emoji", digest)
    assert not (tmp_path / "emoji").exists(), "nothing half done"
    (tmp_path / "emoji").mkdir()
    with pytest.raises(ValueError, match="new folder"):
        fetch_emoji.unpack(archive, tmp_path / "emoji", digest)
