"""A data set encoded once: every image's tokens and label, in memory or memory-mapped from a run's
directory.

Images are seen as in evaluation (the middle square). With flips on, an image has two views, as it is and
mirrored, encoded and stored separately; an epoch shows one of them, a function of (seed, epoch, image).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ibq_fast.data import DataConfig, Loader, ResumableBatchSampler, build_dataset, counter
from ibq_fast.data.config import Split
from ibq_fast.tokenizer import Tokenizer

_META = "meta.json"
_FORMAT = 1


@dataclass(frozen=True)
class TokenCache:
    """``tokens`` [views, N, L] (uint16 or int32), ``labels`` int64 [N], ``classes`` the labels' names."""

    tokens: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return int(self.labels.shape[0])

    def batch(self, epoch: int, indices: np.ndarray, seed: int) -> tuple[Tensor, Tensor]:
        """Tokens int64 [B, L] and labels int64 [B] of images ``indices`` [B], as ``epoch`` shows them."""
        views = self.tokens.shape[0]
        view = (counter.uniform(seed, epoch, indices, counter.FLIP) * views).astype(np.int64)
        tokens = self.tokens[view, indices].astype(np.int64)
        return torch.from_numpy(tokens), torch.from_numpy(self.labels[indices].astype(np.int64))


def build_token_cache(
    tokenizer: Tokenizer,
    data: DataConfig,
    split: Split,
    folder: Path | None = None,
    *,
    say: Callable[[str], None] = lambda message: None,
) -> TokenCache:
    """Encode a split of ``data`` with ``tokenizer``, on the device its weights are on.

    With ``folder`` the tokens are written there (beside it first, then renamed) and mapped; a folder that
    was made from the same tokenizer weights and the same data settings is used as it is. Raises what
    ``build_dataset`` raises.
    """
    if folder is not None:
        fingerprint = _fingerprint(tokenizer, data, split)
        found = open_token_cache(folder, fingerprint)
        if found is not None:
            say(f"{split} tokens: {len(found)} images from {folder}")
            return found
    plain = replace(data, flip=False, crop="center")
    dataset = build_dataset(plain, split)
    sampler = ResumableBatchSampler(len(dataset), data.batch_size, shuffle=False, drop_last=False)
    loader = Loader(dataset, sampler, train=False, num_workers=data.num_workers)
    views = 2 if data.flip and split == "train" else 1
    say(f"{split} tokens: encoding {len(dataset)} images, {views} view{'s' if views > 1 else ''}")
    if folder is None:
        tokens, labels = _encode(tokenizer, loader, len(dataset), views, None)
        return TokenCache(tokens, labels, tuple(dataset.classes))
    temporary = folder.with_name(f".writing-{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        _, labels = _encode(tokenizer, loader, len(dataset), views, temporary / "tokens.npy")
        np.save(temporary / "labels.npy", labels)
        meta = {"fingerprint": fingerprint, "images": len(labels), "classes": list(dataset.classes)}
        (temporary / _META).write_text(json.dumps(meta))
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    written = open_token_cache(folder, fingerprint)
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
    tokens = np.load(folder / "tokens.npy", mmap_mode="r")[:, : meta["images"]]
    return TokenCache(tokens, np.load(folder / "labels.npy"), tuple(meta["classes"]))


def _encode(
    tokenizer: Tokenizer, loader: Loader, total: int, views: int, file: Path | None
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [views, n, L] and labels [n] of the n ≤ total images that could be read."""
    config = tokenizer.config
    dtype = np.uint16 if config.quantizer.codebook_size <= 1 << 16 else np.int32
    shape = (views, total, config.grid[0] * config.grid[1])
    tokens: np.ndarray
    if file is None:
        tokens = np.empty(shape, dtype=dtype)
    else:
        tokens = np.lib.format.open_memmap(file, mode="w+", dtype=dtype, shape=shape)
        _reserve(file)
    labels = np.empty(total, dtype=np.int64)
    device = tokenizer.last_layer.device
    done = 0
    for images, batch_labels in loader:
        end = done + len(images)
        for view in range(views):
            shown = images if view == 0 else images.flip(-1)
            codes = tokenizer.encode(shown.to(device)).reshape(len(images), -1)
            tokens[view, done:end] = codes.cpu().numpy().astype(dtype)
        labels[done:end] = batch_labels.numpy()
        done = end
    if isinstance(tokens, np.memmap):
        tokens.flush()
    return tokens[:, :done], labels[:done]


def _reserve(file: Path) -> None:
    """Take the blocks now: on a full disk this is an OSError, a write to the map would be a bus error."""
    if hasattr(os, "posix_fallocate"):
        with file.open("r+b") as opened:
            os.posix_fallocate(opened.fileno(), 0, file.stat().st_size)


def _fingerprint(tokenizer: Tokenizer, data: DataConfig, split: Split) -> str:
    """What the tokens depend on: weights, data settings, split."""
    digest = hashlib.sha256()
    irrelevant = ("batch_size", "num_workers", "max_bad_fraction", "shuffle_buffer", "resample")
    settings = {name: value for name, value in asdict(data).items() if name not in irrelevant}
    digest.update(json.dumps([_FORMAT, split, settings], sort_keys=True).encode())
    for name, tensor in sorted(tokenizer.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
