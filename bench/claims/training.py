"""One small tokenizer, trained for a number of steps with any quantizer, measured on held-out images."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.claims.methods import Method
from ibq_fast.data import DataConfig, build_loader, to_float, to_uint8
from ibq_fast.evaluate import psnr
from ibq_fast.evaluate.usage import CodebookUsage, usage_figures
from ibq_fast.train.usage import UsageWindow

BATCH = 16
TOKENS = 16  # an image: 4 × 4
ROWS = BATCH * TOKENS
HELD_OUT = 2000  # images
WINDOW = 100  # steps over which training use is counted
RATE, WARMUP = 1e-3, 20
WIDTH = 64


@dataclass(frozen=True)
class Budget:
    """How long a run is: optimiser steps, and at which of them it is measured (multiples of WINDOW)."""

    steps: int
    measured: tuple[int, ...]
    held_out: int = HELD_OUT


class Residual(nn.Module):
    """x + conv(SiLU(norm(conv(SiLU(norm(x)))))), [B, C, h, w]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.path = nn.Sequential(
            nn.GroupNorm(8, channels),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.GroupNorm(8, channels),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.path(x)


def encoder(dim: int) -> nn.Sequential:
    """Images [B, 1, 32, 32] -> features [B, D, 4, 4]."""
    return nn.Sequential(
        nn.Conv2d(1, WIDTH // 4, 4, 2, 1),
        nn.SiLU(),
        nn.Conv2d(WIDTH // 4, WIDTH // 2, 4, 2, 1),
        nn.SiLU(),
        nn.Conv2d(WIDTH // 2, WIDTH, 4, 2, 1),
        Residual(WIDTH),
        nn.GroupNorm(8, WIDTH),
        nn.SiLU(),
        nn.Conv2d(WIDTH, dim, 1),
    )


def decoder(dim: int) -> nn.Sequential:
    """Codes [B, D, 4, 4] -> images [B, 1, 32, 32]."""
    return nn.Sequential(
        nn.Conv2d(dim, WIDTH, 1),
        Residual(WIDTH),
        nn.SiLU(),
        nn.ConvTranspose2d(WIDTH, WIDTH // 2, 4, 2, 1),
        nn.SiLU(),
        nn.ConvTranspose2d(WIDTH // 2, WIDTH // 4, 4, 2, 1),
        nn.SiLU(),
        nn.ConvTranspose2d(WIDTH // 4, 1, 4, 2, 1),
    )


def train(method: Method, codes: int, dim: int, seed: int, budget: Budget) -> Iterator[dict[str, Any]]:
    """Yield the figures of each of ``budget.measured`` steps.

    The seed fixes first weights of encoder and decoder, which are drawn before the quantizer's and so are the
    same with every method, and the order of the images. CPU time is the thread's, so that other processes do
    not count; it leaves out evaluations and the first step, which may set the codes.
    """
    torch.manual_seed(seed)
    data = DataConfig(kind="fashion_mnist", resolution=32, channels=1, batch_size=BATCH)
    batches = build_loader(data, "train", seed=seed).forever()
    encode, decode = encoder(dim), decoder(dim)
    quantizer = method.build(codes, dim, ROWS)
    model = nn.ModuleList([encode, quantizer, decode])
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE, betas=(0.9, 0.99), fused=True)
    window = UsageWindow(quantizer.size, WINDOW, torch.device("cpu"))  # type: ignore[arg-type]
    spent = 0.0
    for step in range(1, budget.steps + 1):
        images = to_float(next(batches).images)
        start = time.thread_time()
        out = quantizer(encode(images))
        loss = F.l1_loss(decode(out.z_q), images) + out.loss
        optimizer.param_groups[0]["lr"] = RATE * min(1.0, step / WARMUP)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        spent += time.thread_time() - start if step > 1 else 0.0
        window.add(out.indices)
        window.end_step()
        if step in budget.measured:
            model.eval()
            figures = evaluate(encode, quantizer, decode, budget.held_out)
            model.train()
            used = usage_figures(window.counts())
            yield {
                "step": step,
                "size": quantizer.size,
                **figures,
                "window_utilisation": used["utilisation"],
                "window_perplexity": used["perplexity"],
                "cpu_ms": 1e3 * spent / (step - 1),
            }


@torch.no_grad()
def evaluate(encode: nn.Module, quantizer: nn.Module, decode: nn.Module, images: int) -> dict[str, float]:
    """``psnr`` (mean over images, on uint8), ``utilisation`` and ``perplexity`` of held-out images."""
    data = DataConfig(kind="fashion_mnist", resolution=32, channels=1, batch_size=2 * BATCH)
    usage = CodebookUsage(quantizer.size)  # type: ignore[arg-type]
    quality: list[Tensor] = []
    for batch in build_loader(data, "val", seed=0):
        part = batch.images[: images - sum(map(len, quality))]
        if not len(part):
            break
        out = quantizer(encode(to_float(part)))
        quality.append(psnr(part, to_uint8(decode(out.z_q))))
        usage.update(out.indices)
    return {"psnr": float(torch.cat(quality).mean()), **usage.figures()}
