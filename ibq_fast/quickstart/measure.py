"""The quick start's samples, and what a classifier recognises in them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ibq_fast.data import to_uint8
from ibq_fast.generator import Generator
from ibq_fast.quickstart.classifier import recognise
from ibq_fast.tokenizer import Tokenizer
from ibq_fast.train.config import SampleConfig

_BATCH = 100  # images drawn together: weights are read once for all of them
_PIXELS = 40  # and decoded together: their activations stay in the caches


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


def draw_images(
    generator: Generator,
    tokenizer: Tokenizer,
    classes: Tensor,
    *,
    sampling: SampleConfig,
    seed: int,
    precision: str | None = None,
) -> Tensor:
    """One uint8 image [C, H, W] for each of ``classes`` [B], as :meth:`Generator.sample` draws it."""
    device = tokenizer.last_layer.device
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
            precision=precision,
        )
        parts += [to_uint8(tokenizer.decode(part, clamp=True)).cpu() for part in tokens.split(_PIXELS)]
    return torch.cat(parts)


def draw_samples(
    generator: Generator,
    tokenizer: Tokenizer,
    judge: nn.Module,
    *,
    per_class: int,
    sampling: SampleConfig,
    seed: int,
    precision: str | None = None,
) -> Samples:
    """``per_class`` images of every class, classes in turn, and what ``judge`` sees in them."""
    classes = torch.arange(generator.config.num_classes).repeat(per_class)
    images = draw_images(generator, tokenizer, classes, sampling=sampling, seed=seed, precision=precision)
    return Samples(images, classes, recognise(judge, images))
