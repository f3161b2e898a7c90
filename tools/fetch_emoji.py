"""Fetches 3,786 colour emoji of 64 x 64 pixels from npm and lays them out as a folder of class folders.

    python tools/fetch_emoji.py data/emoji64 [--registry URL] [--archive FILE]

The package is emoji-datasource-google (the pictures are Google's Noto Emoji, Apache License 2.0); npm fetches
it from the registry it is configured for, and its digest has to be the one written down here. --registry
names another one for this call; --archive takes a package file that is there already and needs no npm.

    data/emoji64/train/<category>/<code points>.png     about 90 %, transparency composited on white, RGB
    data/emoji64/val/<category>/<code points>.png       the rest
    data/emoji64/LICENSE, README.md                     of the package; the README names all licences

Whether a picture is held out follows from a hash of its base emoji alone: variants of one emoji in several
skin tones are on one side together, and the split is the same on every machine.
"""

# ruff: noqa: T201 (the count on standard output is what the caller wants to see)
from __future__ import annotations

import argparse
import base64
import hashlib
import io
import json
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

PACKAGE, VERSION = "emoji-datasource-google", "16.0.0"
SHA512 = "ZRexfzs7MVoLnmzZmNsO4TKhnAJp5D++Vm6PpUpH/jEQQlemp3l88CjZ+DoZ2faM9R4QxZkOPJCoT8DlPhfQ3A=="
HELD_OUT = 0.1
SIDE = 64


def fetch(folder: Path, registry: str | None) -> Path:
    """The package's file, downloaded into ``folder`` by npm. Raises SystemExit where that fails."""
    npm = shutil.which("npm")
    if npm is None:
        raise SystemExit(
            "fetch_emoji: npm was not found; install it, or name the package's file with --archive"
        )
    command = [npm, "pack", f"{PACKAGE}@{VERSION}", "--json"]
    command += [] if registry is None else [f"--registry={registry}"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"fetch_emoji: {' '.join(command[1:])} failed:\n{done.stderr[-2000:]}")
    return folder / f"{PACKAGE}-{VERSION}.tgz"


def unpack(archive: Path, out: Path, sha512: str = SHA512) -> dict[str, int]:
    """Lay ``archive`` out below ``out``, which must not exist; the number of pictures by part.

    Raises ValueError for a file with another digest and for a picture of another size.
    """
    digest = base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
    if digest != sha512:
        raise ValueError(f"archive: expected sha512 {sha512}, got {digest} of {archive}")
    if out.exists():
        raise ValueError(f"out: expected a new folder, got {out}, which exists")
    counts = {"train": 0, "val": 0}
    with tempfile.TemporaryDirectory(dir=out.absolute().parent) as scratch, tarfile.open(archive) as package:
        staged = Path(scratch) / out.name
        for part, category, name in pictures(json.loads(_read(package, "emoji.json"))):
            image = on_white(_read(package, f"img/google/64/{name}"))
            if image.size != (SIDE, SIDE):
                raise ValueError(f"archive: expected pictures of 64 x 64 pixels, got {image.size} in {name}")
            target = staged / part / category / name
            target.parent.mkdir(parents=True, exist_ok=True)
            image.save(target)
            counts[part] += 1
        for text in ("LICENSE", "README.md"):
            (staged / text).write_bytes(_read(package, text))
        staged.rename(out)
    return counts


def pictures(emoji: list[dict[str, Any]]) -> Iterator[tuple[str, str, str]]:
    """(part, class folder, file name) of every picture that ``emoji``, the package's emoji.json, lists."""
    for entry in emoji:
        category = re.sub(r"[^a-z]+", "_", entry["category"].lower())
        digest = hashlib.blake2b(entry["unified"].encode(), digest_size=8).digest()
        part = "val" if int.from_bytes(digest, "big") < HELD_OUT * 2.0**64 else "train"
        for variant in (entry, *entry.get("skin_variations", {}).values()):
            if variant["has_img_google"]:
                yield part, category, variant["image"]


def on_white(png: bytes) -> Image.Image:
    """The RGB picture that an image with transparency shows on white."""
    with Image.open(io.BytesIO(png)) as image:
        rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, rgba).convert("RGB")


def _read(package: tarfile.TarFile, name: str) -> bytes:
    member = package.extractfile(f"package/{name}")
    if member is None:
        raise ValueError(f"archive: expected a file package/{name}, got something else")
    return member.read()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--registry", help="of npm packages; default: the one that npm is configured for")
    parser.add_argument("--archive", type=Path, help=f"{PACKAGE}-{VERSION}.tgz, instead of fetching it")
    options = parser.parse_args(arguments)
    options.out.absolute().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        archive = options.archive or fetch(Path(scratch), options.registry)
        counts = unpack(archive, options.out)
    print(f"{options.out}: {counts['train']} pictures to train with, {counts['val']} held out")


if __name__ == "__main__":
    main()
