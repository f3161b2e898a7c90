"""Images drawn from a generator, as a numbered set."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass

import torch

from ibq_fast.data import to_uint8
from ibq_fast.evaluate.facts import model_sha256
from ibq_fast.evaluate.sources import Block
from ibq_fast.generator import Generator
from ibq_fast.tokenizer import Tokenizer


@dataclass(frozen=True)
class Sampling:
    """Arguments of ``Generator.sample``."""

    cfg_scale: float = 2.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0


class GeneratedSource:
    """``count`` images, image i of class i mod classes: as many of each class as of any other, give or take
    one. An image depends on the models, the sampling and its number alone.
    """

    def __init__(
        self, generator: Generator, tokenizer: Tokenizer, count: int, sampling: Sampling, batch_size: int = 32
    ) -> None:
        if count < 1 or batch_size < 1:
            raise ValueError(f"count, batch_size: expected at least 1, got {count} and {batch_size}")
        if tokenizer.config.quantizer.codebook_size != generator.config.vocab_size:
            raise ValueError(
                f"tokenizer: expected one of {generator.config.vocab_size} codes, as the generator, "
                f"got {tokenizer.config.quantizer.codebook_size}"
            )
        self.generator, self.tokenizer, self.sampling = generator, tokenizer, sampling
        self._count, self._batch_size = count, batch_size
        drawn = ", ".join(f"{name} {value:g}" for name, value in asdict(sampling).items())
        self.description = f"{count:,} images drawn with {drawn}"
        weights = [model_sha256(generator), model_sha256(tokenizer)]
        content = json.dumps(["generated", count, asdict(sampling), weights])
        self.digest = hashlib.sha256(content.encode()).hexdigest()
        rows, columns = generator.config.grid
        if rows != columns:
            raise ValueError(f"generator: expected square images, got a grid of {rows} x {columns} tokens")
        self.resolution = rows * tokenizer.downsampling

    def __len__(self) -> int:
        return self._count

    def block(self, start: int, stop: int) -> Block:
        indices = torch.arange(start, min(stop, self._count))
        images = []
        for part in indices.split(self._batch_size):
            tokens = self.generator.sample(
                (part % self.generator.config.num_classes).to(self.tokenizer.last_layer.device),
                first_image=int(part[0]),
                **asdict(self.sampling),
            )
            images.append(to_uint8(self.tokenizer.decode(tokens)).cpu())
        return Block(torch.cat(images), indices, [])

    def name(self, index: int) -> str:
        return f"image {index}"
