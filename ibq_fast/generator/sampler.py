"""Sampling whole images: the loop over positions, guidance, and the choice of a token.

Guidance combines hidden vectors, not logits: the head is linear, so
head(u + s (c - u)) = head(u) + s (head(c) - head(u)), and one product with the vocabulary serves both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ibq_fast.generator.decoder import ROW_GROUP, Decoder, round_up
from ibq_fast.ops import choose_tokens

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
    slots = round_up(images, ROW_GROUP // branches)
    slot_ids = F.pad(class_ids, (0, slots - images), value=model.null_class)
    if guidance is not None:
        slot_ids = torch.cat((slot_ids, torch.full_like(slot_ids, model.null_class)))
    image_ids = torch.arange(first_image, first_image + images, device=class_ids.device)

    decoder = Decoder(model, slot_ids)
    x = decoder.class_vectors
    inputs = class_ids.new_zeros(slots)
    for position in range(total):
        if position > 0:
            inputs[:images] = tokens[:, position - 1]
            x = model.embed_tokens(inputs)
            x = x if branches == 1 else x.repeat(2, 1)
        hidden = decoder.step(x, position)
        if guidance is not None:
            conditional, unconditional = hidden.chunk(2)
            hidden = torch.lerp(unconditional, conditional, guidance)
        hidden = F.pad(hidden, (0, 0, 0, round_up(slots, ROW_GROUP) - slots))
        logits = model.head(hidden)[:images].float()
        tokens[:, position] = choose_tokens(
            logits,
            temperature=torch.full((images,), temperature),
            top_k=torch.full((images,), top_k),
            top_p=torch.full((images,), top_p),
            seed=torch.full((images,), seed),
            image=image_ids,
            position=torch.full((images,), position),
        )
        if progress is not None:
            progress(position + 1, total)
    if not bool(torch.isfinite(logits).all()):
        raise ValueError("model: expected finite logits, got NaN or infinity at the last position")
    return tokens
