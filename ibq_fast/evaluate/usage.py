"""How much of a codebook is in use."""

from __future__ import annotations

import torch
from torch import Tensor

from ibq_fast.ops import code_histogram


def usage_figures(counts: Tensor) -> dict[str, float]:
    """Of how often each code was used, integers [K]: ``utilisation``, the share of codes used at least
    once, and ``perplexity``, the exponential of the use's entropy (K when all are used alike)."""
    counts = counts.cpu()  # not every device has float64
    total = counts.sum()
    if int(total) == 0:
        return {"utilisation": 0.0, "perplexity": 0.0}
    share = counts.double() / total
    entropy = -torch.special.xlogy(share, share).sum()
    return {"utilisation": float((counts > 0).double().mean()), "perplexity": float(entropy.exp())}


class CodebookUsage:
    """Counts code use over a set, batch by batch, in O(K) memory.

    ``counts`` [K] int64 is what it has seen; two sets' use together is the sum of their counts, which is what
    :meth:`all_reduce` does over processes.
    """

    def __init__(self, codebook_size: int, device: torch.device | str = "cpu") -> None:
        if codebook_size < 1:
            raise ValueError(f"codebook_size: expected at least 1, got {codebook_size}")
        self.counts = torch.zeros(codebook_size, dtype=torch.int64, device=device)

    def update(self, indices: Tensor) -> None:
        """Count codes, int64 of any shape. Raises ValueError for an index outside [0, K) on the CPU."""
        counts = code_histogram(indices.detach().reshape(-1), self.counts.numel())
        self.counts += counts.to(self.counts.device)

    def all_reduce(self, group: torch.distributed.ProcessGroup | None = None) -> None:
        """Make ``counts`` the sum over the processes of ``group``; call it once, at the end."""
        torch.distributed.all_reduce(self.counts, group=group)

    def figures(self) -> dict[str, float]:
        """``utilisation`` in [0, 1] and ``perplexity`` in [1, K]; zeros before anything was counted."""
        return usage_figures(self.counts)

    def dead_codes(self) -> Tensor:
        """Indices [dead] int64 of the codes that were never used."""
        return (self.counts == 0).nonzero().squeeze(1)
