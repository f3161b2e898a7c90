"""The training loop's own task of a config, over images of noise instead of the config's data."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from ibq_fast.train import TokenizerRun
from ibq_fast.train.config import parse_run
from ibq_fast.train.device import build_accelerator
from ibq_fast.train.tokenizer import TokenizerTask


def noise_task(
    config: str, overrides: Sequence[str], scratch: Path, *, images: int, side: int
) -> TokenizerTask:
    """The task of the YAML file ``config`` with ``overrides`` on the CPU.

    It reads ``images`` squares of uniform noise, ``side`` pixels wide, which are written below ``scratch``.
    The perceptual distance is none unless ``overrides`` say otherwise: its weights are a download.
    """
    random = torch.Generator().manual_seed(0)
    folder = scratch / "noise"
    folder.mkdir(exist_ok=True)
    for i in range(images):
        pixels = torch.randint(0, 256, (side, side, 3), dtype=torch.uint8, generator=random).numpy()
        Image.fromarray(pixels).save(folder / f"{i}.png")
    options = [
        f"--config={config}",
        f"--run.dir={scratch / 'run'}",
        "--run.device=cpu",
        "--perceptual=none",
        "--data.kind=image_folder",
        f"--data.root={scratch}",
        f"--data.val_root={scratch}",
        "--data.resample=false",
        "--data.num_workers=0",
        *overrides,
    ]
    run = parse_run(TokenizerRun, options)
    with contextlib.redirect_stderr(io.StringIO()):
        return TokenizerTask(run, build_accelerator(run.run))
