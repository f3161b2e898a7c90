"""The Inception Score's formula over any classifier's logits, from sums that do not grow with the set."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class ClassScore(NamedTuple):
    """Mean and standard deviation over the splits of exp(E KL(p(y|x) ‖ p(y))); NaN without images."""

    mean: float
    deviation: float


def score_sums(logits: Tensor, split: Tensor, splits: int) -> Tensor:
    """What a batch adds, float64 [splits, classes + 2]: Σ p, Σ p log p, the number of images.

    logits: [B, classes]; split: int64 [B] in [0, splits), the part of the set that each image belongs to.
    """
    log_p = logits.detach().cpu().double().log_softmax(1)
    p = log_p.exp()
    each = torch.cat([p, (p * log_p).sum(1, keepdim=True), torch.ones(len(p), 1, dtype=torch.float64)], 1)
    return torch.zeros(splits, each.shape[1], dtype=torch.float64).index_add_(0, split, each)


def class_score(sums: Tensor) -> ClassScore:
    """The score of added up :func:`score_sums`; splits without images are left out."""
    sums = sums[sums[:, -1] > 0]
    if not len(sums):
        return ClassScore(float("nan"), float("nan"))
    counts = sums[:, -1]
    mean = sums[:, :-2] / counts[:, None]
    divergence = sums[:, -2] / counts - torch.special.xlogy(mean, mean).sum(1)
    scores = divergence.exp()
    return ClassScore(float(scores.mean()), float(scores.std(correction=0)))
