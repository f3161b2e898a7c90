"""A data set encoded once: every image's tokens and label, in memory or memory-mapped from a folder.

An image has one view or several, encoded and stored separately: its middle square, as evaluation sees it,
further crops, and the mirror image of each; an epoch shows one of them, a function of (seed, epoch, image).
A token takes the fewest whole bytes that hold the largest code: 2 for 16,384 codes, 3 for 262,144.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from ibq_fast.data import DataConfig, Loader, ShardLoader, build_view_loader, counter
from ibq_fast.data.config import Split
from ibq_fast.tokenizer import Tokenizer

_META = "meta.json"
_FORMAT = 2


@dataclass(frozen=True)
class TokenCache:
    """``stored`` uint8 [N, views, L, bytes], lowest byte first; ``labels`` int64 [N]; ``classes`` has the
    labels' names (of tar shards: their numbers)."""

    stored: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return int(self.labels.shape[0])

    @property
    def views(self) -> int:
        """Views of each image."""
        return int(self.stored.shape[1])

    def tokens(self, indices: np.ndarray, view: np.ndarray | int = 0) -> Tensor:
        """Tokens int64 [B, L] of images ``indices`` [B], each in its ``view`` [B]."""
        return torch.from_numpy(_unpacked(self.stored[indices, view]))

    def batch(self, epoch: int, indices: np.ndarray, seed: int) -> tuple[Tensor, Tensor]:
        """Tokens int64 [B, L] and labels int64 [B] of images ``indices`` [B], as ``epoch`` shows them."""
        view = (counter.uniform(seed, epoch, indices, counter.FLIP) * self.views).astype(np.int64)
        return self.tokens(indices, view), torch.from_numpy(self.labels[indices].astype(np.int64))


def build_token_cache(
    tokenizer: Tokenizer,
    data: DataConfig,
    split: Split,
    folder: Path | None = None,
    *,
    crops: int = 1,
    limit: int | None = None,
    say: Callable[[str], None] = lambda message: None,
) -> TokenCache:
    """Encode a split of ``data`` with ``tokenizer``, on the device its weights are on.

    Training images have ``crops`` squares (the middle one, and others by ``data.crop``), with ``data.flip``
    each of them mirrored too. ``limit``: no more than so many images, the first ones.

    With ``folder`` the tokens are written below it (beside their place first, then renamed) and mapped, under
    a name that says which tokenizer, data settings and views they come from: what is there already is used
    as it is, by any number of runs. A second process that wants the same waits for the first.

    Raises what ``build_view_loader`` raises, and ValueError for samples of tar shards without a label.
    """
    train = split == "train"
    crops = crops if train else 1
    views = crops * (2 if train and data.flip else 1)
    if folder is None:
        memory = _Memory(tokenizer, views)
        labels, classes = _encode(tokenizer, data, split, crops, memory.add, limit, say)
        return TokenCache(memory.stored(), labels, classes)
    fingerprint = _fingerprint(tokenizer, data, split, crops, views, limit)
    place = folder / f"{split}-{fingerprint[:12]}"
    found = open_token_cache(place, fingerprint)
    if found is not None:
        say(f"{split} tokens: {len(found)} images from {place}")
        return found
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(place):
        found = open_token_cache(place, fingerprint)
        if found is not None:
            return found
        temporary = place.with_name(f".writing-{place.name}")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            with (temporary / "tokens.bin").open("wb") as file:
                labels, classes = _encode(
                    tokenizer, data, split, crops, _Written(tokenizer, file).add, limit, say
                )
            np.save(temporary / "labels.npy", labels)
            shape = (len(labels), views, *_token_shape(tokenizer))
            meta = {"fingerprint": fingerprint, "shape": shape, "classes": list(classes)}
            (temporary / _META).write_text(json.dumps(meta))
            shutil.rmtree(place, ignore_errors=True)
            os.replace(temporary, place)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        written = open_token_cache(place, fingerprint)
        assert written is not None
        return written


def open_token_cache(folder: Path, fingerprint: str) -> TokenCache | None:
    """The cache in ``folder``, mapped; None when there is none or it was made from something else."""
    try:
        meta = json.loads((folder / _META).read_text())
    except (OSError, ValueError):
        return None
    if meta.get("fingerprint") != fingerprint:
        return None
    stored = np.memmap(folder / "tokens.bin", dtype=np.uint8, mode="r", shape=tuple(meta["shape"]))
    return TokenCache(stored, np.load(folder / "labels.npy"), tuple(meta["classes"]))


def encode_images(tokenizer: Tokenizer, images: Tensor) -> Tensor:
    """uint8 [B, C, R, R] -> tokens int64 [B, L] on the tokenizer's device, rows of tokens in raster order."""
    return tokenizer.encode(images.to(tokenizer.last_layer.device)).flatten(1)


def _encode(
    tokenizer: Tokenizer,
    data: DataConfig,
    split: Split,
    crops: int,
    add: Callable[[np.ndarray], None],
    limit: int | None,
    say: Callable[[str], None],
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Hand tokens int64 [B, views, L] to ``add``, batch by batch; the labels [N] and their names."""
    loader = build_view_loader(data, split, crops)
    mirrored = (False, True) if data.flip and split == "train" else (False,)
    size = f"{len(loader.dataset)} images" if isinstance(loader, Loader) else f"{len(loader.shards)} shards"
    say(f"{split} tokens: encoding {size}, {crops * len(mirrored)} view{'s' * (crops * len(mirrored) > 1)}")
    labels: list[np.ndarray] = []
    for images, batch_labels in _first(loader, limit):
        squares = images.reshape(len(images), crops, *images.shape[-3:])
        views = [
            encode_images(tokenizer, squares[:, crop].flip(-1) if mirror else squares[:, crop])
            for crop in range(crops)
            for mirror in mirrored
        ]
        add(torch.stack(views, dim=1).cpu().numpy())
        labels.append(batch_labels.numpy())
    loader.close()
    joined = np.concatenate([np.empty(0, np.int64), *labels])
    return joined, _classes(loader, joined, data, split)


def _first(loader: Loader | ShardLoader, limit: int | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches up to ``limit`` images."""
    left = limit
    for images, labels in loader:
        yield images[:left], labels[:left]
        if left is not None:
            left -= len(labels)
            if left <= 0:
                return


def _classes(
    loader: Loader | ShardLoader, labels: np.ndarray, data: DataConfig, split: Split
) -> tuple[str, ...]:
    if isinstance(loader, Loader):
        return tuple(loader.dataset.classes)
    missing = int((labels < 0).sum())
    if missing:
        pattern = data.root if split == "train" else data.val_root
        raise ValueError(
            f"data.{'root' if split == 'train' else 'val_root'}: expected a label (.cls, or label in .json) "
            f"with every sample of {pattern}, got {missing} of {len(labels)} without"
        )
    return tuple(str(number) for number in range(int(labels.max(initial=-1)) + 1))


class _Memory:
    """Tokens that stay in memory."""

    def __init__(self, tokenizer: Tokenizer, views: int) -> None:
        length, self._bytes = _token_shape(tokenizer)
        self._parts = [np.empty((0, views, length, self._bytes), np.uint8)]

    def add(self, tokens: np.ndarray) -> None:
        self._parts.append(_packed(tokens, self._bytes))

    def stored(self) -> np.ndarray:
        return np.concatenate(self._parts)


class _Written:
    """Tokens that go to a file as they come; a full disk is an OSError."""

    def __init__(self, tokenizer: Tokenizer, file: BinaryIO) -> None:
        self._bytes = _token_shape(tokenizer)[1]
        self._file = file

    def add(self, tokens: np.ndarray) -> None:
        self._file.write(_packed(tokens, self._bytes).data)


def _token_shape(tokenizer: Tokenizer) -> tuple[int, int]:
    """Tokens in an image, and bytes in a token."""
    rows, columns = tokenizer.config.grid
    return rows * columns, max(1, -(-(tokenizer.config.quantizer.codebook_size - 1).bit_length() // 8))


def _packed(tokens: np.ndarray, size: int) -> np.ndarray:
    """int64 [...] -> its lowest ``size`` bytes, uint8 [..., size]."""
    little = np.ascontiguousarray(tokens, dtype="<i8")
    return np.ascontiguousarray(little.view(np.uint8).reshape(*tokens.shape, 8)[..., :size])


def _unpacked(stored: np.ndarray) -> np.ndarray:
    """The inverse of :func:`_packed`."""
    wide = np.zeros((*stored.shape[:-1], 8), np.uint8)
    wide[..., : stored.shape[-1]] = stored
    return wide.view("<i8")[..., 0].astype(np.int64)


@contextmanager
def _alone(place: Path) -> Iterator[None]:
    """No other process inside for the same ``place``."""
    with place.with_name(f".{place.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _fingerprint(
    tokenizer: Tokenizer, data: DataConfig, split: Split, crops: int, views: int, limit: int | None
) -> str:
    """What the tokens depend on: weights, data settings, split, views."""
    digest = hashlib.sha256()
    irrelevant = ["flip", "batch_size", "num_workers", "max_bad_fraction", "shuffle_buffer", "resample"]
    if crops == 1:
        irrelevant += ["crop", "min_crop_scale"]
    settings: dict[str, Any] = {k: v for k, v in asdict(data).items() if k not in irrelevant}
    digest.update(json.dumps([_FORMAT, split, crops, views, limit, settings], sort_keys=True).encode())
    for name, tensor in sorted(tokenizer.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
