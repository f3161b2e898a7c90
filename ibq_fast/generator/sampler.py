"""Sampling whole images: the loop over positions, guidance, and the choice of a token.

Guidance combines hidden vectors, not logits: the head is linear, so
head(u + s (c - u)) = head(u) + s (head(c) - head(u)), and one product with the vocabulary serves both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ibq_fast.generator.filtering import filter_logits
from ibq_fast.generator.philox import gumbel

if TYPE_CHECKING:
    from ibq_fast.generator.generator import Generator


def sample_tokens(
    model: Generator,
    class_ids: Tensor,
    *,
    guidance: float | None,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    first_image: int,
    progress: Callable[[int, int], None] | None,
) -> Tensor:
    """Tokens int64 [B, rows * columns]; arguments as in :meth:`Generator.sample`, already checked.

    ``ValueError`` when the model has diverged: looked at once, after the last position, since every position
    would make an accelerator wait, and what is not finite stays so.
    """
    images, total = class_ids.shape[0], model.config.num_tokens
    tokens = class_ids.new_empty(images, total)
    if images == 0:
        return tokens
    branches = 1 if guidance is None else 2
    rows = branches * images
    row_classes = class_ids
    if guidance is not None:
        row_classes = torch.cat((class_ids, torch.full_like(class_ids, model.null_class)))
    image_ids = torch.arange(first_image, first_image + images, device=class_ids.device)

    decoder = model.decoder(rows)
    decoder.admit(torch.arange(rows), row_classes)
    inputs = class_ids.new_zeros(rows)
    for position in range(total):
        if position > 0:
            inputs = tokens[:, position - 1].repeat(branches)
        positions = torch.full((rows,), position)
        hidden = decoder.advance(inputs, positions)
        if guidance is not None:
            conditional, unconditional = hidden.chunk(2)
            hidden = torch.lerp(unconditional, conditional, guidance)
        logits = decoder.logits(hidden).float()
        tokens[:, position] = choose_tokens(
            logits,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            image_ids=image_ids,
            position=position,
        )
        if progress is not None:
            progress(position + 1, total)
    if not bool(torch.isfinite(logits).all()):
        raise ValueError("model: expected finite logits, got NaN or infinity at the last position")
    return tokens


def choose_tokens(
    logits: Tensor,
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    image_ids: Tensor,
    position: int,
) -> Tensor:
    """One token per row: a draw from softmax(filter(logits / temperature)), int64 [B].

    ``logits`` float32 [B, V]; ``image_ids`` int64 [B]. The draw is the argmax of logits plus Gumbel noise,
    and the noise is a function of (seed, image, position, code) alone. top_k = 1 is the plain argmax.
    """
    if top_k == 1:
        return logits.argmax(dim=-1)
    kept = filter_logits(logits / temperature, top_k, top_p)
    return kept.add_(gumbel(seed, image_ids, position, logits.shape[-1])).argmax(dim=-1)
