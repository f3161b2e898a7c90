"""Image files through a tokenizer and back: pictures, PSNR, code usage."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ibq_fast.data import BadImageError, DataError, SquareCrop, decode_image, to_uint8
from ibq_fast.data.paths import EXTENSIONS
from ibq_fast.evaluate.devices import pick_device
from ibq_fast.evaluate.images import psnr, reconstruction_grid, save_png, usage_plot
from ibq_fast.evaluate.usage import CodebookUsage
from ibq_fast.tokenizer import Tokenizer

_GRID_ROWS = 4


def reconstruct(
    images: Sequence[str | Path],
    tokenizer: str | Path,
    out: str | Path,
    *,
    resolution: int | None = None,
    columns: int = 8,
    batch_size: int = 16,
    device: str = "auto",
) -> dict[str, Any]:
    """Reconstruct ``images`` (files, or folders searched through) and write ``out``/reconstructions.png,
    usage.png and report.json; returns the report.

    Protocol: shorter side to ``resolution`` (default: the tokenizer's) by antialiased bicubic, the middle
    square, PSNR per image on uint8, its mean over images. Unreadable files are listed under ``unreadable``.
    Raises DataError when there is no readable image, FileNotFoundError for a path that does not exist.
    """
    if columns < 1 or batch_size < 1:
        raise ValueError(f"columns, batch_size: expected at least 1, got {columns} and {batch_size}")
    files = list(_files(images))
    model = Tokenizer.from_pretrained(tokenizer, device=pick_device(device))
    crop = SquareCrop(resolution or model.config.resolution)
    usage = CodebookUsage(model.config.quantizer.codebook_size)
    unreadable: list[tuple[str, str]] = []
    shown: list[tuple[Tensor, Tensor]] = []
    quality: list[Tensor] = []
    for batch in _batches(files, crop, model.config.image_channels, batch_size, unreadable):
        codes = model.encode(batch.to(model.last_layer.device))
        copies = to_uint8(model.decode(codes)).cpu()
        usage.update(codes)
        quality.append(psnr(batch, copies))
        if sum(len(pair[0]) for pair in shown) < columns * _GRID_ROWS:
            shown.append((batch, copies))
    if not quality:
        raise DataError(f"images: expected at least one that can be read, got {len(files)} that cannot")
    folder = Path(out)
    originals, copies = (torch.cat(side)[: columns * _GRID_ROWS] for side in zip(*shown, strict=True))
    save_png(reconstruction_grid(originals, copies, columns), folder / "reconstructions.png")
    usage_plot(usage.counts, folder / "usage.png")
    each = torch.cat(quality)
    report = {
        "images": len(each),
        "psnr": float(each.clamp_max(100.0).mean()),
        "codebook_size": len(usage.counts),
        "codes_used": int((usage.counts > 0).sum()),
        **usage.figures(),
        "resolution": crop.resolution,
        "unreadable": unreadable,
    }
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    return report


def _files(images: Sequence[str | Path]) -> Iterator[Path]:
    for name in images:
        path = Path(name)
        if path.is_dir():
            yield from sorted(p for p in path.rglob("*") if p.suffix.lower() in EXTENSIONS and p.is_file())
        elif path.exists():
            yield path
        else:
            raise FileNotFoundError(f"images: expected a file or a folder, got {str(path)!r}")


def _batches(
    files: Sequence[Path],
    crop: SquareCrop,
    channels: int,
    batch_size: int,
    unreadable: list[tuple[str, str]],
) -> Iterator[Tensor]:
    """uint8 [at most batch_size, C, R, R] of the files that can be read; the others go to ``unreadable``."""
    batch: list[Tensor] = []
    for index, file in enumerate(files):
        try:
            batch.append(crop(decode_image(file, channels), 0, 0, index))
        except BadImageError as error:
            unreadable.append((str(file), error.fault.reason))
        if len(batch) == batch_size:
            yield torch.stack(batch)
            batch = []
    if batch:
        yield torch.stack(batch)
