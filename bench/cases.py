"""What is timed: sizes, the three regimes of logits, and the inputs that have them.

Inputs hold values that bfloat16 represents exactly, so that one float64 truth serves both dtypes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Regime = Literal["uniform", "training-like", "peaked"]
REGIMES: tuple[Regime, ...] = ("uniform", "training-like", "peaked")


@dataclass(frozen=True)
class Case:
    """One size: N rows against K codes of dimension D, in a regime where logits matter to the cost.

    entries: names of the suite's entries that run at this size; empty for all that say they can.
    """

    n: int
    k: int
    d: int
    regime: Regime | None = None
    entries: tuple[str, ...] = ()

    @property
    def size(self) -> str:
        return f"N={self.n} K={self.k} D={self.d}"

    @property
    def label(self) -> str:
        return self.size if self.regime is None else f"{self.size} {self.regime}"

    @property
    def product(self) -> float:
        """Operations of one matrix product z Eᵀ."""
        return 2.0 * self.n * self.k * self.d


def _representable(values: Tensor) -> Tensor:
    return values.to(torch.bfloat16).to(torch.float32)


def features_and_codes(case: Case, seed: int = 0) -> tuple[Tensor, Tensor]:
    """z [N, D] and codebook [K, D], float32.

    uniform: codes N(0, 1/D), logits of spread (standard deviation in a row) 0.001. training-like: the same
    codes, spread 0.1. peaked: features near N(0, 1) codes. Without a regime: both N(0, 1).
    """
    random = torch.Generator().manual_seed(seed)
    z = torch.randn(case.n, case.d, generator=random)
    codes = torch.randn(case.k, case.d, generator=random)
    if case.regime in ("uniform", "training-like"):
        z *= 0.001 if case.regime == "uniform" else 0.1
        codes *= case.d**-0.5
    elif case.regime == "peaked":
        chosen = torch.randint(case.k, (case.n,), generator=random)
        z = z.mul_(0.1).add_(codes[chosen])
    return _representable(z), _representable(codes)


def upstream_gradient(case: Case, seed: int = 1) -> Tensor:
    """∂L/∂z_q [N, D] of a mean over outputs: N(0, 1) / (N D)."""
    random = torch.Generator().manual_seed(seed)
    return _representable(torch.randn(case.n, case.d, generator=random) / (case.n * case.d))


def hidden_and_head(case: Case, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [N, D] of N(0, 1), head [K, D] of N(0, 1/D) and targets [N] int64 for a cross-entropy."""
    random = torch.Generator().manual_seed(seed)
    hidden = torch.randn(case.n, case.d, generator=random)
    head = torch.randn(case.k, case.d, generator=random) * case.d**-0.5
    targets = torch.randint(case.k, (case.n,), generator=random)
    return _representable(hidden), _representable(head), targets
