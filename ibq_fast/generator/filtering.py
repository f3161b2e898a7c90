"""Restricting a distribution to its likeliest codes."""

from __future__ import annotations

import torch
from torch import Tensor


def filter_logits(logits: Tensor, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """A copy of ``logits`` float [B, V] with every code outside the filter set to -inf.

    ``top_k`` > 0 keeps the codes at least as large as the k-th largest (ties with it included; k > V keeps
    all). Then ``top_p`` < 1 keeps, going down from the largest, every code until the probability before it
    exceeds ``top_p``; the largest is always kept.
    """
    kept = logits.clone()
    if 0 < top_k < logits.shape[-1]:
        smallest = logits.topk(top_k, dim=-1).values[..., -1:]
        kept.masked_fill_(logits < smallest, -torch.inf)
    if top_p < 1.0:
        ordered, order = kept.sort(dim=-1, descending=True, stable=True)
        reached = ordered.softmax(dim=-1).cumsum(dim=-1) > top_p
        beyond = torch.zeros_like(reached)
        beyond[..., 1:] = reached[..., :-1]
        kept.masked_fill_(torch.zeros_like(beyond).scatter_(-1, order, beyond), -torch.inf)
    return kept
