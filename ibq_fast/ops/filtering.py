"""Restricting a distribution to its likeliest codes: the definition, by sorting, on any device."""

from __future__ import annotations

import torch
from torch import Tensor


def filter_logits(logits: Tensor, top_k: int | Tensor = 0, top_p: float | Tensor = 1.0) -> Tensor:
    """A copy of ``logits`` float [B, V] with every code outside the filter set to -inf.

    ``top_k`` > 0 keeps the codes at least as large as the k-th largest (ties with it included; 0 and k > V
    keep all). Then ``top_p`` < 1 keeps, going down from the largest (of equals the lowest code first), every
    code until the probability before it exceeds ``top_p``; the largest is always kept. Both may be tensors
    [B], a setting for each row.

    Probabilities are float64 (float32 on devices without it); where the probability before a code is within
    their rounding of ``top_p``, either answer is right.
    """
    codes = logits.shape[-1]
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    rank = torch.as_tensor(top_k, device=logits.device).expand(logits.shape[:-1])
    rank = torch.where((rank <= 0) | (rank > codes), codes, rank)
    kth = ordered.gather(-1, rank.unsqueeze(-1) - 1)
    dropped = ordered < kth
    share = torch.as_tensor(top_p, dtype=torch.float32, device=logits.device).expand(logits.shape[:-1])
    wide = ordered.masked_fill(dropped, -torch.inf).to(widest(logits.device))
    before = wide.softmax(dim=-1).cumsum(dim=-1).roll(1, dims=-1)
    before[..., 0] = 0
    dropped |= (before > share.unsqueeze(-1)) & (share < 1).unsqueeze(-1)
    return logits.masked_fill(torch.zeros_like(dropped).scatter_(-1, order, dropped), -torch.inf)


def widest(device: torch.device) -> torch.dtype:
    """float64 where the device computes it, else float32."""
    return torch.float64 if device.type in ("cpu", "cuda") else torch.float32
