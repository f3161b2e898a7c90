"""The pictures of a tokenizer's report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ibq_fast.evaluate.codebook_map import codebook_map
from ibq_fast.evaluate.images import reconstruction_grid, save_png, usage_plot
from ibq_fast.evaluate.sources import ImageSource
from ibq_fast.evaluate.tally import Tally
from ibq_fast.tokenizer import Tokenizer

_FIRST, _EXTREME = 32, 8


def draw_tokenizer_pictures(
    folder: Path,
    source: ImageSource,
    tally: Tally,
    tokenizer: Tokenizer,
    reconstruct: Callable[[Tensor], Tensor],
) -> dict[str, str]:
    """Write reconstructions.png (the first images), worst.png and best.png (by PSNR; equals by number),
    usage.png and codebook.png; their names and captions. ``reconstruct``: uint8 [B, C, R, R] to the same."""
    seen = tally.seen.nonzero().flatten()
    order = seen[torch.argsort(tally.values["psnr"][seen], stable=True)]
    rows = {
        "reconstructions.png": (seen[:_FIRST], "originals above their reconstructions"),
        "worst.png": (order[:_EXTREME], "the worst"),
        "best.png": (order.flip(0)[:_EXTREME], "the best"),
    }
    captions = {}
    for file, (indices, caption) in rows.items():
        originals = torch.cat([source.block(i, i + 1).images for i in indices.tolist()])
        save_png(reconstruction_grid(originals, reconstruct(originals).cpu()), folder / file)
        if file != "reconstructions.png":
            named = [f"{source.name(i)} ({tally.values['psnr'][i]:.2f} dB)" for i in indices.tolist()]
            caption = f"{caption}: {', '.join(named)}"
        captions[file] = caption
    counts = tally.sums["codes"]
    usage_plot(counts, folder / "usage.png")
    codebook_map(tokenizer.quantizer.codebook, counts, folder / "codebook.png")
    return captions | {
        "usage.png": "how often each code was used",
        "codebook.png": "the codebook at its two principal components, coloured by use",
    }
