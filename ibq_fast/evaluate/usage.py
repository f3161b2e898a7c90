"""How much of a codebook is in use."""

from __future__ import annotations

import torch


def usage_figures(counts: torch.Tensor) -> dict[str, float]:
    """Of how often each code was used, integers [K]: ``utilisation``, the share of codes used at least
    once, and ``perplexity``, the exponential of the use's entropy (K when all are used alike)."""
    total = counts.sum()
    if int(total) == 0:
        return {"utilisation": 0.0, "perplexity": 0.0}
    share = counts.double() / total
    entropy = -torch.special.xlogy(share, share).sum()
    return {"utilisation": float((counts > 0).double().mean()), "perplexity": float(entropy.exp())}
