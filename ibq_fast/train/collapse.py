"""Watches for a codebook that collapses: few codes in use, or a straight-through softmax that passes nothing.

Why codebooks collapse and what helps, with measurements: ``docs/collapse.md``.
"""

from __future__ import annotations

import logging
import math

import torch
from torch import Tensor

from ibq_fast.evaluate.usage import usage_figures
from ibq_fast.quantizer import IndexBackpropQuantizer, VectorQuantizer

log = logging.getLogger(__name__)

# A row is saturated when one code has nearly all of it: what reaches the encoder is the rest of the row.
SATURATED = 0.99
# A codebook has collapsed when it uses less than this share of what a uniform choice would have hit.
COLLAPSED = 0.25
_MAX_ROWS = 256
_MAX_LOGITS = 1 << 23


class CollapseMonitor:
    """Figures of a quantizer's health, and one warning, with a remedy, when it collapses."""

    def __init__(self, quantizer: IndexBackpropQuantizer | VectorQuantizer) -> None:
        self._quantizer = quantizer
        self._warned = False

    @torch.no_grad()
    def logit_figures(self, features: Tensor) -> dict[str, float]:
        """Of some of ``features`` [B, D, h, w], for IBQ: ``logit_scale``; ``logit_spread``, the standard
        deviation of a row of logits over the codes, its mean over rows; ``saturated``, the share of rows
        whose softmax gives one code more than 0.99. Holders of one codebook call it together.
        """
        if not isinstance(self._quantizer, IndexBackpropQuantizer):
            return {}
        rows = features.movedim(1, -1).flatten(0, -2)
        shards = self._quantizer.shards
        processes = 1 if shards is None else shards.size  # all their rows are compared with all codes at once
        limit = max(1, min(_MAX_ROWS, _MAX_LOGITS // (self._quantizer.codebook_size * processes)))
        rows = rows[:: max(1, math.ceil(len(rows) / limit))]
        logits = self._quantizer.logits(rows, channel_last=True)
        greatest = (logits.amax(1) - logits.logsumexp(1)).exp()
        return {
            "logit_scale": self._quantizer.logit_scale,
            "logit_spread": float(logits.std(1, correction=0).mean()),
            "saturated": float((greatest > SATURATED).float().mean()),
        }

    def look(self, counts: Tensor, figures: dict[str, float]) -> str | None:
        """Judge a finished window of code use, integers [K]; the warning, or None (always, after the first).

        ``figures``: of :meth:`logit_figures`.
        """
        tokens, size = int(counts.sum()), counts.numel()
        usage = usage_figures(counts)
        reachable = 1 - math.exp(-tokens / size)
        if self._warned or usage["utilisation"] >= COLLAPSED * reachable:
            return None
        self._warned = True
        message = (
            f"codebook collapse: {usage['utilisation']:.1%} of {size} codes in use over {tokens} tokens, "
            f"perplexity {usage['perplexity']:.0f}. {self._remedy(figures)} See docs/collapse.md."
        )
        log.warning(message)
        return message

    def _remedy(self, figures: dict[str, float]) -> str:
        if not figures:
            return "Codes that are not chosen get no gradient: model.quantizer.kind=ibq, or init=kmeans."
        state = (
            f"Logit scale {figures['logit_scale']:.3g}, spread {figures['logit_spread']:.3g}, "
            f"{figures['saturated']:.0%} of the features saturated"
        )
        if figures["saturated"] > 0.5:
            return (
                f"{state}: hardly any gradient passes the quantizer; lower model.quantizer.logit_scale, or "
                "set logit_scale_kind=inverse_sqrt_dim."
            )
        return (
            f"{state}: the softmax passes gradients, but nothing pulls codes to the features; try "
            "model.quantizer.similarity=euclidean with init=kmeans, or a higher loss.entropy_weight."
        )
