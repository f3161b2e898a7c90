"""The Fréchet distance between two Gaussians."""

from __future__ import annotations

import torch
from torch import Tensor

from ibq_fast.evaluate.moments import Gaussian


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """|μ_a − μ_b|² + Tr(Σ_a + Σ_b − 2 (Σ_a Σ_b)^½); NaN when one has no covariance (fewer than two vectors).

    With Σ = A Aᵀ the trace of the root is the sum of the singular values of A_aᵀ A_b: no matrix that is not
    symmetric, no complex root, no constant added to singular covariances. Eigenvalues that are rounding alone
    (below D ε λ_max) count as zero, so fewer vectors than dimensions give what their subspace gives. Where
    eigenvalues are above that, this agrees with scipy.linalg.sqrtm of the product.

    Raises ValueError when the dimensions differ.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"b: expected {len(a.mean)} dimensions, as a has, got {len(b.mean)}")
    if not (torch.isfinite(a.covariance).all() and torch.isfinite(b.covariance).all()):
        return float("nan")
    root = torch.linalg.svdvals(_factor(a.covariance).T @ _factor(b.covariance)).sum()
    traces = a.covariance.trace() + b.covariance.trace()
    distance = (a.mean - b.mean).square().sum() + traces - 2 * root
    return max(float(distance), 0.0)


def _factor(covariance: Tensor) -> Tensor:
    """A [D, rank] with A Aᵀ = ``covariance``."""
    values, vectors = torch.linalg.eigh(covariance)
    kept = values > values[-1].clamp_min(0) * len(values) * torch.finfo(values.dtype).eps
    return vectors[:, kept] * values[kept].sqrt()
