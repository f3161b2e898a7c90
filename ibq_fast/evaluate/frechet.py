"""The Fréchet distance between two Gaussians."""

from __future__ import annotations

import torch
from torch import Tensor

from ibq_fast.evaluate.moments import Gaussian


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """|μ_a − μ_b|² + Tr(Σ_a + Σ_b − 2 (Σ_a Σ_b)^½); NaN when one has no covariance (fewer than two vectors).

    With Σ = A Aᵀ the trace of the root is the sum of the singular values of A_aᵀ A_b: no root of a matrix
    that is not symmetric, no complex numbers, no constant added to singular covariances. A comes from a
    pivoted Cholesky decomposition, which ends where what is left is rounding alone (below D ε times the
    largest variance): fewer vectors than dimensions give what their subspace gives. (An eigendecomposition
    would do, but LAPACK's may not converge on the nearly empty covariances of few images.)

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
    rows = torch.zeros_like(covariance)  # of Aᵀ
    left = covariance.diagonal().clone()  # the variances that the rows so far do not explain
    negligible = left.max().clamp_min(0) * len(left) * torch.finfo(left.dtype).eps
    rank = 0
    while rank < len(left):
        pivot = int(left.argmax())
        if left[pivot] <= negligible:
            break
        done = rows[:rank]
        torch.div(covariance[pivot] - done[:, pivot] @ done, left[pivot].sqrt(), out=rows[rank])
        left -= rows[rank].square()
        left[pivot] = 0
        rank += 1
    return rows[:rank].T
