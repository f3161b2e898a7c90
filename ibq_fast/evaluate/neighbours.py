"""Precision and recall of generated images by nearest neighbours (Kynkäänniemi et al. 2019)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

_ROWS, _COLUMNS = 1024, 4096  # of a tile of distances: 32 MiB of float64


class PrecisionRecall(NamedTuple):
    """Shares in [0, 1]; NaN when a set has no k-th neighbour."""

    precision: float
    recall: float


def precision_recall(reference: np.ndarray, samples: np.ndarray, neighbours: int = 3) -> PrecisionRecall:
    """``reference`` [N, D] and ``samples`` [M, D], floating point arrays or memory maps.

    A vector is in a set's manifold when it is no farther from one of its vectors than that one's k-th
    nearest neighbour in the set (itself not counted). Precision: share of the samples in the reference's
    manifold; recall: share of the reference in the samples'. Both are NaN when a set has at most k vectors.

    Distances are float64, in tiles: memory does not grow with N M. 2(N² + M² + 2NM)D floating point
    operations. Distances that differ by their rounding count as equal, so duplicates are at distance 0.
    """
    if reference.ndim != 2 or samples.ndim != 2 or reference.shape[1] != samples.shape[1]:
        raise ValueError(
            f"samples: expected [M, D] beside reference [N, D], got {samples.shape} and {reference.shape}"
        )
    if neighbours < 1:
        raise ValueError(f"neighbours: expected at least 1, got {neighbours}")
    if min(len(reference), len(samples)) <= neighbours:
        return PrecisionRecall(float("nan"), float("nan"))
    centre = _mean(reference)
    return PrecisionRecall(
        _share_within(samples, reference, _radii(reference, neighbours, centre), centre),
        _share_within(reference, samples, _radii(samples, neighbours, centre), centre),
    )


def _mean(x: np.ndarray) -> Tensor:
    zero = torch.zeros(x.shape[1], dtype=torch.float64)
    total = zero.clone()
    for part in _parts(x, _COLUMNS, zero):
        total += part.sum(0)
    return total / len(x)


def _parts(x: np.ndarray, size: int, centre: Tensor) -> Iterator[Tensor]:
    """float64 [at most size, D], about ``centre``: what is left to cancel in the distances is small."""
    for start in range(0, len(x), size):
        yield torch.from_numpy(np.array(x[start : start + size], dtype=np.float64)) - centre


def _radii(x: np.ndarray, neighbours: int, centre: Tensor) -> Tensor:
    """Squared distance of each vector to its k-th neighbour, [N]: the (k + 1)-th smallest, the vector being
    its own nearest."""
    found = []
    for rows in _parts(x, _ROWS, centre):
        nearest = torch.empty(len(rows), 0, dtype=torch.float64)
        for columns in _parts(x, _COLUMNS, centre):
            both = torch.cat([nearest, _squared_distances(rows, columns)[0]], 1)
            nearest = both.topk(min(neighbours + 1, both.shape[1]), dim=1, largest=False).values
        found.append(nearest[:, -1])
    return torch.cat(found)


def _share_within(x: np.ndarray, centres: np.ndarray, radii: Tensor, centre: Tensor) -> float:
    inside = 0
    for rows in _parts(x, _ROWS, centre):
        within = torch.zeros(len(rows), dtype=torch.bool)
        for columns, limit in zip(_parts(centres, _COLUMNS, centre), radii.split(_COLUMNS), strict=True):
            distances, rounding = _squared_distances(rows, columns)
            within |= (distances <= limit + rounding).any(1)
        inside += int(within.sum())
    return inside / len(x)


def _squared_distances(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """|a|² + |b|² − 2 a·b [A, B], and a bound of the error of two such numbers."""
    lengths = a.square().sum(1)[:, None] + b.square().sum(1)
    rounding = lengths * (2 * a.shape[1] * torch.finfo(torch.float64).eps)
    return (lengths - 2 * (a @ b.T)).clamp_min_(0), rounding
