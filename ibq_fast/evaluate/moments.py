"""Mean and covariance of features that pass by once, in float64 and in memory that does not grow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Gaussian(NamedTuple):
    """``mean`` [D] and sample covariance ``covariance`` [D, D], float64, of ``number`` vectors.

    Below two vectors the covariance is NaN; ``number`` is None where a file does not say.
    """

    mean: Tensor
    covariance: Tensor
    number: int | None


class Moments:
    """Sums of x - c and (x - c)(x - c)ᵀ about a centre c, which is the mean of the first batch.

    With c near the mean, nothing cancels in the covariance. What order batches come in, and how they are cut,
    changes the result by float64's rounding alone; so does :meth:`merge`.
    """

    def __init__(self, dim: int) -> None:
        self.count = 0
        self.centre = torch.zeros(dim, dtype=torch.float64)
        self.first = torch.zeros(dim, dtype=torch.float64)
        self.second = torch.zeros(dim, dim, dtype=torch.float64)

    def update(self, features: Tensor) -> None:
        """Add vectors [B, D] of any floating dtype and device. Raises ValueError for another width."""
        if features.dim() != 2 or features.shape[1] != len(self.centre):
            raise ValueError(f"features: expected [B, {len(self.centre)}], got {list(features.shape)}")
        if not len(features):
            return
        x = features.detach().cpu().double()
        if self.count == 0:
            self.centre = x.mean(0)
        x = x - self.centre
        self.first += x.sum(0)
        self.second.addmm_(x.T, x)
        self.count += len(x)

    def merge(self, other: Moments) -> None:
        """Add what ``other`` has seen."""
        if other.count == 0:
            return
        if self.count == 0:
            self.load_state_dict(other.state_dict())
            return
        # Σ (x - c)(x - c)ᵀ with x - c = (x - d) + s, s = d - c.
        shift = other.centre - self.centre
        cross = torch.outer(shift, other.first)
        self.second += other.second + cross + cross.T + other.count * torch.outer(shift, shift)
        self.first += other.first + other.count * shift
        self.count += other.count

    def gaussian(self) -> Gaussian:
        """Mean and covariance, divided by count - 1, of what was seen; NaN where that is not defined."""
        nan = float("nan")
        if self.count == 0:
            return Gaussian(torch.full_like(self.first, nan), torch.full_like(self.second, nan), 0)
        offset = self.first / self.count
        if self.count == 1:
            return Gaussian(self.centre + offset, torch.full_like(self.second, nan), 1)
        covariance = (self.second - self.count * torch.outer(offset, offset)) / (self.count - 1)
        return Gaussian(self.centre + offset, (covariance + covariance.T) / 2, self.count)

    def state_dict(self) -> dict[str, Any]:
        """Everything, as tensors and a number; copies."""
        return {
            "count": self.count,
            "centre": self.centre.clone(),
            "first": self.first.clone(),
            "second": self.second.clone(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Become what ``state`` was taken of."""
        self.count = int(state["count"])
        self.centre, self.first, self.second = state["centre"], state["first"], state["second"]
