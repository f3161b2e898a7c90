"""A small classifier, trained on real images, that judges generated ones."""

from __future__ import annotations

import math
import time
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ibq_fast.data import to_float

_BATCH = 64
_PEAK_RATE = 4e-3
_WARM_SHARE = 0.2
_SMOOTHING = 0.05


class TrainedClassifier(NamedTuple):
    """``model`` in eval mode; ``accuracy`` on the held-out real images after each epoch."""

    model: nn.Module
    accuracy: list[float]


class SmallClassifier(nn.Sequential):
    """Images [B, channels, H, W] float in [-1, 1], H and W multiples of 4 -> logits [B, classes]."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__(
            *_stage(channels, 32),
            nn.MaxPool2d(2),
            *_stage(32, 64),
            nn.MaxPool2d(2),
            *_stage(64, 128),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(128, classes),
        )


def train_classifier(
    images: Tensor,
    labels: Tensor,
    held_out: Tensor,
    held_out_labels: Tensor,
    *,
    classes: int,
    epochs: float,
    seed: int,
    device: torch.device,
    max_seconds: float = math.inf,
) -> TrainedClassifier:
    """Train on uint8 ``images`` [N, C, H, W] (mirrored at random) and int64 ``labels`` [N].

    ``epochs`` may be a fraction; after ``max_seconds`` training stops early, its learning rate decayed.
    Raises ValueError when there are fewer than two images.
    """
    if len(images) < 2:
        raise ValueError(f"images: expected at least 2, got {len(images)}")
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SmallClassifier(images.shape[1], classes).to(device)
        return TrainedClassifier(
            model,
            _fit(model, images, labels, held_out, held_out_labels, epochs, generator, device, max_seconds),
        )


@torch.no_grad()
def recognise(model: nn.Module, images: Tensor) -> Tensor:
    """The class, int64 [B], that ``model`` sees in each of uint8 ``images`` [B, C, H, W]."""
    device = next(model.parameters()).device
    parts = [model(to_float(part.to(device))).argmax(1).cpu() for part in images.split(500)]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)


def _fit(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    held_out: Tensor,
    held_out_labels: Tensor,
    epochs: float,
    generator: torch.Generator,
    device: torch.device,
    max_seconds: float,
) -> list[float]:
    batch = min(_BATCH, len(images))
    per_epoch = len(images) // batch
    steps = max(1, round(epochs * per_epoch))
    optimizer = torch.optim.AdamW(model.parameters(), lr=_PEAK_RATE, weight_decay=0.01)
    accuracy: list[float] = []
    start = time.monotonic()
    order = torch.randperm(len(images), generator=generator)
    for step in range(steps):
        progress = max(step / steps, (time.monotonic() - start) / max_seconds)
        if progress >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = _PEAK_RATE * _rate_factor(progress)
        at = step % per_epoch
        chosen = order[at * batch : (at + 1) * batch]
        mirrored = torch.rand(len(chosen), 1, 1, 1, generator=generator) < 0.5
        seen = torch.where(mirrored, images[chosen].flip(-1), images[chosen])
        logits = model(to_float(seen.to(device)))
        loss = F.cross_entropy(logits, labels[chosen].to(device), label_smoothing=_SMOOTHING)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if at == per_epoch - 1 and step != steps - 1:
            order = torch.randperm(len(images), generator=generator)
            accuracy.append(_accuracy(model, held_out, held_out_labels))
            model.train()
    accuracy.append(_accuracy(model, held_out, held_out_labels))
    return accuracy


def _accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()
    return float((recognise(model, images) == labels).double().mean())


def _rate_factor(progress: float) -> float:
    """Up in a straight line, down along half a cosine."""
    if progress < _WARM_SHARE:
        return 0.05 + 0.95 * progress / _WARM_SHARE
    return 0.5 * (1 + math.cos(math.pi * (progress - _WARM_SHARE) / (1 - _WARM_SHARE)))


def _stage(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
