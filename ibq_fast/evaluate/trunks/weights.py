"""Weight files that are downloads: given by path, found in torch's cache, or fetched when that is allowed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


class UnavailableError(RuntimeError):
    """A network cannot be had; the message says what is missing and how to get it."""


@dataclass(frozen=True)
class _Published:
    url: str
    sha256: str  # or its first digits, which is what the file's publisher states

    @property
    def file(self) -> str:
        return self.url.rpartition("/")[2]


_PUBLISHED = {
    "inception": _Published(
        "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
        "weights-inception-2015-12-05-6726825d.pth",
        "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
    ),
    "lpips_alex": _Published("https://download.pytorch.org/models/alexnet-owt-7be5be79.pth", "7be5be79"),
    "lpips_vgg": _Published("https://download.pytorch.org/models/vgg16-397923af.pth", "397923af"),
}


@dataclass(frozen=True)
class Weights:
    """Where weight files come from.

    paths: a file for some of "inception", "lpips_alex", "lpips_vgg".
    fetch: download what is neither given nor in torch's cache, with checksum and progress.
    """

    paths: Mapping[str, Path] = field(default_factory=dict)
    fetch: bool = False

    def __post_init__(self) -> None:
        for name, path in self.paths.items():
            if name not in _PUBLISHED:
                raise ValueError(f"paths: expected some of {', '.join(_PUBLISHED)}, got {name!r}")
            if not Path(path).is_file():
                raise FileNotFoundError(f"{name}: no such file: {path}")

    def locate(self, name: str) -> Path:
        """The file of ``name``. Raises UnavailableError when it is nowhere and may not be, or could not be,
        fetched."""
        if name in self.paths:
            return Path(self.paths[name])
        known = _PUBLISHED[name]
        cached = Path(torch.hub.get_dir()) / "checkpoints" / known.file
        if cached.is_file() and sha256_of(cached).startswith(known.sha256):
            return cached
        if not self.fetch:
            option = name.replace("_", "-")
            raise UnavailableError(
                f"needs the weights {known.file}: --{option} PATH, or --fetch to download them"
            )
        cached.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(known.url, str(cached), known.sha256, progress=True)
        except (OSError, RuntimeError) as error:
            raise UnavailableError(f"{known.url} could not be fetched: {error}") from error
        return cached

    def read(self, name: str) -> tuple[dict[str, Any], str]:
        """The tensors of ``name``'s file, and its SHA-256. Raises as :meth:`locate`, and ValueError for a
        file that holds no weights."""
        path = self.locate(name)
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises whatever the bytes make it raise
            raise ValueError(f"{path}: not a readable file of weights: {error}") from error
        if not isinstance(state, dict):
            raise ValueError(f"{path}: expected a dict of weights, got {type(state).__name__}")
        return state, sha256_of(path)


def is_published(name: str, sha256: str) -> bool:
    """Whether these are the weights that published figures were computed with."""
    return name not in _PUBLISHED or sha256.startswith(_PUBLISHED[name].sha256)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal digits."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
