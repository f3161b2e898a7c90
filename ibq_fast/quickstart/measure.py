"""The quick start's figures: what a tokenizer keeps, what a generator's images are recognised as."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ibq_fast.data import to_uint8
from ibq_fast.evaluate import psnr, usage_figures
from ibq_fast.generator import Generator
from ibq_fast.ops import code_histogram
from ibq_fast.quickstart.classifier import recognise
from ibq_fast.tokenizer import Tokenizer
from ibq_fast.train.config import SampleConfig

_BATCH = 100
_LARGEST = 100.0  # dB given to an image that comes back exactly


class Reconstruction(NamedTuple):
    """``figures`` of a tokenizer on a set, ``counts`` int64 [K] of its codes, ``images`` uint8: the first
    reconstructions."""

    figures: dict[str, float]
    counts: Tensor
    images: Tensor


class Samples(NamedTuple):
    """Generated uint8 ``images`` [B, C, H, W], the ``classes`` asked for and those ``seen`` in them [B]."""

    images: Tensor
    classes: Tensor
    seen: Tensor

    @property
    def recognised(self) -> float:
        """Share of the images in which the classifier sees the class that was asked for."""
        return float((self.seen == self.classes).double().mean())

    def recognised_by_class(self, classes: int) -> list[float]:
        """The same for each class."""
        hits = (self.seen == self.classes).double()
        return [float(hits[self.classes == c].mean()) for c in range(classes)]


@torch.no_grad()
def measure_reconstruction(tokenizer: Tokenizer, images: Tensor, *, shown: int = 32) -> Reconstruction:
    """PSNR and code use of ``tokenizer`` on uint8 ``images`` [B, C, H, W].

    Figures: ``psnr`` (mean over images of each one's PSNR on uint8, peak 255, all pixels),
    ``psnr_of_mean_error`` (the PSNR of the mean square error over all images, which is lower), ``l1`` (mean
    absolute error in [0, 255]), ``utilisation`` and ``perplexity`` of the codes over the whole set.
    """
    device = tokenizer.last_layer.device
    size = tokenizer.config.quantizer.codebook_size
    counts = torch.zeros(size, dtype=torch.int64)
    quality: list[Tensor] = []
    squares: list[Tensor] = []
    distances: list[Tensor] = []
    first: list[Tensor] = []
    for part in images.split(_BATCH):
        indices = tokenizer.encode(part.to(device))
        counts += code_histogram(indices.reshape(-1), size).cpu()
        copies = to_uint8(tokenizer.decode(indices, clamp=True)).cpu()
        quality.append(psnr(part, copies).clamp_max(_LARGEST))
        error = part.double() - copies.double()
        squares.append(error.square().flatten(1).mean(1))
        distances.append(error.abs().flatten(1).mean(1))
        if len(first) * _BATCH < shown:
            first.append(copies)
    mean_square = max(float(torch.cat(squares).mean()), 255.0**2 / 10 ** (_LARGEST / 10))
    figures = {
        "psnr": float(torch.cat(quality).mean()),
        "psnr_of_mean_error": 10 * math.log10(255.0**2 / mean_square),
        "l1": float(torch.cat(distances).mean()),
        **usage_figures(counts),
    }
    return Reconstruction(figures, counts, torch.cat(first)[:shown])


def draw_samples(
    generator: Generator,
    tokenizer: Tokenizer,
    judge: nn.Module,
    *,
    per_class: int,
    sampling: SampleConfig,
    seed: int,
) -> Samples:
    """``per_class`` images of every class, classes in turn, and what ``judge`` sees in them."""
    device = tokenizer.last_layer.device
    number = generator.config.num_classes
    classes = torch.arange(number).repeat(per_class)
    parts = []
    for start in range(0, len(classes), _BATCH):
        tokens = generator.sample(
            classes[start : start + _BATCH].to(device),
            cfg_scale=sampling.cfg_scale,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            seed=seed,
            first_image=start,
        )
        parts.append(to_uint8(tokenizer.decode(tokens, clamp=True)).cpu())
    images = torch.cat(parts)
    return Samples(images, classes, recognise(judge, images))
