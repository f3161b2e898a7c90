"""A map of a codebook: codes at their two principal components, coloured by use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from ibq_fast.evaluate.moments import Moments

_CHUNK = 8192
_MOST_DOTS = 20_000
_BINS = 240


def principal_plane(codebook: Tensor) -> tuple[Tensor, float]:
    """Codes [K, D] at their first two principal components, float32 [K, 2], and the share of the variance
    that these explain. In chunks: no float64 copy of the codebook. One dimension gives a second one of
    zeros."""
    moments = Moments(codebook.shape[1])
    for part in codebook.detach().split(_CHUNK):
        moments.update(part)
    gaussian = moments.gaussian()
    if moments.count < 2:
        return torch.zeros(len(codebook), 2), 0.0
    values, vectors = torch.linalg.eigh(gaussian.covariance)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)[:, :2]
    # The sign of an eigenvector is arbitrary: its largest entry is made positive.
    largest = vectors.abs().argmax(0)
    vectors = vectors * vectors[largest, torch.arange(vectors.shape[1])].sign()
    plane = torch.zeros(len(codebook), 2)
    for start in range(0, len(codebook), _CHUNK):
        part = codebook[start : start + _CHUNK].detach().cpu().double() - gaussian.mean
        plane[start : start + len(part), : vectors.shape[1]] = (part @ vectors).float()
    return plane, float(values[:2].sum() / values.sum().clamp_min(torch.finfo(torch.float64).tiny))


def codebook_map(codebook: Tensor, counts: Tensor, path: str | Path) -> Path:
    """Draw codes [K, D] coloured by how often they were used, ``counts`` int64 [K], as PNG: a dot each, or
    for more than 20,000 codes the mean use in each of 240 x 240 bins; unused codes (and bins) in red."""
    if codebook.dim() != 2 or counts.shape != codebook.shape[:1]:
        raise ValueError(
            "counts: expected [K] beside codebook [K, D], "
            f"got {list(counts.shape)} and {list(codebook.shape)}"
        )
    plane, explained = principal_plane(codebook)
    x, y = plane.numpy().T
    use = np.log10(1 + counts.cpu().numpy().astype(np.float64))
    drawn: Any
    figure = Figure(figsize=(6.4, 5.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if len(codebook) <= _MOST_DOTS:
        dead = use == 0
        size = float(np.clip(4000 / len(codebook), 2, 30))
        axes.scatter(x[dead], y[dead], s=size, color="#d62828", label=f"{int(dead.sum())} codes not used")
        drawn = axes.scatter(x[~dead], y[~dead], s=size, c=use[~dead], cmap="viridis")
        if dead.any():
            axes.legend(frameon=False)
    else:
        codes, columns, rows = np.histogram2d(x, y, bins=_BINS)
        total, _, _ = np.histogram2d(x, y, bins=(columns, rows), weights=use)
        mean = np.where(codes > 0, total / np.maximum(codes, 1), np.nan)
        axes.pcolormesh(columns, rows, np.where(mean == 0, 0.0, np.nan).T, cmap="autumn")
        drawn = axes.pcolormesh(columns, rows, np.where(mean > 0, mean, np.nan).T, cmap="viridis")
    figure.colorbar(drawn, ax=axes, label="log₁₀(1 + times used)")
    axes.set(xlabel="first principal component", ylabel="second")
    axes.set_title(f"{len(codebook):,} codes; the plane holds {explained:.0%} of their variance")
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=120)
    return target
