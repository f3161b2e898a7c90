"""Image files through a tokenizer and back: pictures, PSNR, code usage."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ibq_fast.data import DataError, to_uint8
from ibq_fast.evaluate.devices import pick_device
from ibq_fast.evaluate.images import reconstruction_grid, save_png, usage_plot
from ibq_fast.evaluate.resize import Resizer
from ibq_fast.evaluate.similarity import LARGEST_PSNR, psnr
from ibq_fast.evaluate.sources import FolderSource, find_files
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
    usage.png and report.json; returns the report. :func:`evaluate_tokenizer` measures more.

    Protocol: shorter side to ``resolution`` (default: the tokenizer's) by antialiased bicubic, the middle
    square, PSNR per image on uint8, its mean over images. Unreadable files are listed under ``unreadable``.
    Raises DataError when there is no readable image, FileNotFoundError for a path that does not exist.
    """
    if columns < 1 or batch_size < 1:
        raise ValueError(f"columns, batch_size: expected at least 1, got {columns} and {batch_size}")
    files = list(find_files(images))
    if not files:
        raise DataError("images: expected at least one that can be read, found none")
    model = Tokenizer.from_pretrained(tokenizer, device=pick_device(device))
    resizer = Resizer(resolution or model.config.resolution, "bicubic-antialiased")
    source = FolderSource(files, resizer, model.config.image_channels, description=str(images))
    usage = CodebookUsage(model.config.quantizer.codebook_size)
    unreadable: list[tuple[str, str]] = []
    shown: list[tuple[Tensor, Tensor]] = []
    quality: list[Tensor] = []
    for start in range(0, len(source), batch_size):
        batch, _, bad = source.block(start, start + batch_size)
        unreadable += bad
        if not len(batch):
            continue
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
        "psnr": float(each.clamp_max(LARGEST_PSNR).mean()),
        "codebook_size": len(usage.counts),
        "codes_used": int((usage.counts > 0).sum()),
        **usage.figures(),
        "resolution": resizer.resolution,
        "unreadable": unreadable,
    }
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    return report
