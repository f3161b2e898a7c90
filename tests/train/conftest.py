"""Tiny runs: 8-pixel photographs of nothing, a one-block tokenizer, a one-block generator."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ibq_fast.data import DataConfig
from ibq_fast.generator import GeneratorConfig
from ibq_fast.quantizer import QuantizerConfig
from ibq_fast.tokenizer import LossConfig, Tokenizer, TokenizerConfig
from ibq_fast.train import GeneratorRun, OptimConfig, RunConfig, ScheduleConfig, TokenizerRun

torch.set_num_threads(1)  # tiny tensors: threads would only wait for each other

SIDE = 8


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve PNGs of two classes."""
    root = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for label, name in enumerate(("flat", "rough")):
        (root / name).mkdir()
        for i in range(6):
            pixels = random.integers(0, 256, 3) + label * random.integers(-40, 40, (SIDE, SIDE, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / name / f"{i}.png")
    return root


def data_config(photos: Path) -> DataConfig:
    return DataConfig(
        root=str(photos), val_root=str(photos), resolution=SIDE, batch_size=4, num_workers=0, flip=True
    )


def tokenizer_model() -> TokenizerConfig:
    return TokenizerConfig(
        resolution=SIDE,
        base_channels=32,
        channel_multipliers=(1, 1),
        num_res_blocks=1,
        attention_resolutions=(),
        latent_channels=32,
        quantizer=QuantizerConfig(codebook_size=16, dim=8, init="normal"),
    )


@pytest.fixture
def tokenizer_run(photos: Path, tmp_path: Path) -> TokenizerRun:
    """Six steps without a discriminator."""
    return TokenizerRun(
        run=RunConfig(
            dir=str(tmp_path / "run"),
            steps=6,
            device="cpu",
            log_every=2,
            eval_every=0,
            sample_every=0,
            save_every=2,
            eval_batches=1,
            pictures=4,
            tensorboard=False,
        ),
        data=data_config(photos),
        model=tokenizer_model(),
        loss=LossConfig(discriminator_channels=8, discriminator_layers=1),
        optim=OptimConfig(lr=1e-3, ema_decay=0.9, schedule=ScheduleConfig(kind="cosine", warmup_steps=2)),
    )


@pytest.fixture
def generator_run(tokenizer_run: TokenizerRun, tmp_path: Path) -> GeneratorRun:
    """Six steps on the tokens of an untrained tokenizer."""
    torch.manual_seed(0)
    folder = Tokenizer(tokenizer_run.model).save_pretrained(tmp_path / "tokenizer")
    return GeneratorRun(
        run=replace(tokenizer_run.run, dir=str(tmp_path / "generator_run")),
        data=tokenizer_run.data,
        tokenizer=str(folder),
        model=GeneratorConfig(vocab_size=16, num_classes=2, grid=(4, 4), depth=1, num_heads=2, width=16),
        optim=OptimConfig(
            kind="adamw", lr=1e-3, betas=(0.9, 0.95), weight_decay=0.05, clip_norm=1.0, ema_decay=0.9
        ),
    )
