"""Images of chosen classes from a generator, as PNG files."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from ibq_fast.data import to_uint8
from ibq_fast.evaluate.devices import pick_device
from ibq_fast.evaluate.images import image_grid, save_png
from ibq_fast.generator import Generator
from ibq_fast.tokenizer import Tokenizer

_GRID_IMAGES = 1024


def sample(
    generator: str | Path,
    tokenizer: str | Path,
    out: str | Path,
    *,
    classes: str = "all",
    per_class: int = 8,
    cfg_scale: float = 2.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 16,
    device: str = "auto",
) -> list[Path]:
    """Draw ``per_class`` images of each class and write them to ``out``, with grid.png, a row per class (of
    at most 1024 images); returns the images' files. Image i of the run depends on ``seed`` and i alone.

    Raises ValueError for classes that the generator does not have, or a tokenizer that does not fit it.
    """
    if per_class < 1 or batch_size < 1:
        raise ValueError(f"per_class, batch_size: expected at least 1, got {per_class} and {batch_size}")
    place = pick_device(device)
    model = Generator.from_pretrained(generator, device=place)
    decoder = Tokenizer.from_pretrained(tokenizer, device=place)
    if decoder.config.quantizer.codebook_size != model.config.vocab_size:
        raise ValueError(
            f"tokenizer: expected one of {model.config.vocab_size} codes, as the generator, "
            f"got {decoder.config.quantizer.codebook_size}"
        )
    wanted = parse_classes(classes, model.config.num_classes)
    labels = torch.tensor(wanted).repeat_interleave(per_class)
    folder = Path(out)
    files, grid = [], []
    for start in range(0, len(labels), batch_size):
        part = labels[start : start + batch_size]
        tokens = model.sample(
            part.to(place),
            cfg_scale=cfg_scale,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            first_image=start,
        )
        images = to_uint8(decoder.decode(tokens)).cpu()
        for i, (image, label) in enumerate(zip(images, part.tolist(), strict=True), start):
            files.append(save_png(image, folder / f"class{label:04d}_{i % per_class:05d}.png"))
        if start < _GRID_IMAGES:
            grid.append(images)
    save_png(image_grid(torch.cat(grid), per_class), folder / "grid.png")
    return files


def parse_classes(text: str, num_classes: int) -> list[int]:
    """``all`` or a list such as ``3,7,20-25`` -> class ids. Raises ValueError for anything else."""
    if text == "all":
        return list(range(num_classes))
    found: list[int] = []
    for item in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", item)
        if not match:
            raise ValueError(f"classes: expected all, or a list such as 3,7,20-25, got {text!r}")
        first, last = int(match[1]), int(match[2] or match[1])
        if first > last or last >= num_classes:
            raise ValueError(f"classes: expected ids from 0 to {num_classes - 1}, got {item.strip()!r}")
        found.extend(range(first, last + 1))
    return list(dict.fromkeys(found))
