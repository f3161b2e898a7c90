"""What the timed things have to give: the formulas in a chosen dtype, without N×K tensors, derived by hand.

In float64 this is the truth; in float32 the same code tells how much a plain float32 evaluation loses, which
is the yardstick for ours. Gradients are computed for all rows that matter and compared on a sample of rows
and codes, so that the check of a large size costs about three products instead of ten.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.eager import BETA, EPSILON, TEMPERATURE

BLOCK_ELEMENTS = 1 << 24
SAMPLED_ROWS = 64
SAMPLED_CODES = 256


def _blocks(n: int, k: int) -> Iterator[slice]:
    step = max(1, BLOCK_ELEMENTS // k)
    for start in range(0, n, step):
        yield slice(start, min(start + step, n))


@dataclass(frozen=True)
class Scores:
    """best [N]: the largest logit; indices [N]: its code; lse [N]: the log-sum-exp."""

    best: Tensor
    indices: Tensor
    lse: Tensor


def scores(z: Tensor, codebook: Tensor, dtype: torch.dtype, bias: Tensor | None, scale: float) -> Scores:
    """Statistics of S = scale · z @ codebook.T + bias."""
    z, codebook = z.to(dtype), codebook.to(dtype)
    parts = []
    for rows in _blocks(len(z), len(codebook)):
        s = (z[rows] @ codebook.T).mul_(scale)
        if bias is not None:
            s += bias.to(dtype)
        parts.append((*s.max(dim=1), s.logsumexp(dim=1)))
    best, indices, lse = (torch.cat(part) for part in zip(*parts, strict=True))
    return Scores(best, indices, lse)


@dataclass(frozen=True)
class Sample:
    """Rows of z and rows of the codebook on which gradients are compared."""

    rows: Tensor
    selected: Tensor
    others: Tensor


def sample(indices: Tensor, k: int) -> Sample:
    """Some rows, some of the codes that ``indices`` select and some of those that they do not."""
    random = torch.Generator().manual_seed(7)
    used = indices.unique()
    free = torch.ones(k, dtype=torch.bool)
    free[used] = False
    others = free.nonzero().squeeze(1)

    def some(values: Tensor, count: int) -> Tensor:
        return values[torch.randperm(len(values), generator=random)[:count]]

    return Sample(
        some(torch.arange(len(indices)), SAMPLED_ROWS), some(used, SAMPLED_CODES), some(others, SAMPLED_CODES)
    )


def quantizer_step(
    z: Tensor, codebook: Tensor, upstream: Tensor, dtype: torch.dtype, where: Sample | None = None
) -> tuple[dict[str, Tensor], Sample]:
    """Losses, and gradients of :func:`bench.eager.objective` on a sample, by the formulas of
    docs/architecture.md, equations (1) to (5); ``where`` repeats an earlier sample."""
    z, codebook, upstream = (t.to(dtype) for t in (z, codebook, upstream))
    (n, d), k = z.shape, len(codebook)
    lse, lse_tau, entropy = z.new_empty(n), z.new_empty(n), z.new_empty(n)
    indices, readout = torch.empty(n, dtype=torch.int64), torch.empty_like(z)
    mean = z.new_zeros(k)
    for rows in _blocks(n, k):
        s = z[rows] @ codebook.T
        indices[rows], lse[rows] = s.argmax(dim=1), s.logsumexp(dim=1)
        readout[rows] = torch.exp(s - lse[rows, None]) @ codebook
        s /= TEMPERATURE
        lse_tau[rows] = s.logsumexp(dim=1)
        s -= lse_tau[rows, None]
        p = s.exp()
        mean += p.sum(dim=0) / n
        entropy[rows] = -s.mul_(p).sum(dim=1)
    code = codebook[indices]
    g = upstream + 2 * (code - z) / (n * d)
    delta = (g * readout).sum(dim=1)
    c = torch.log(mean + EPSILON) + mean / (mean + EPSILON)
    expected_c = z.new_empty(n)
    for rows in _blocks(n, k):
        expected_c[rows] = torch.exp((z[rows] @ codebook.T) / TEMPERATURE - lse_tau[rows, None]) @ c

    def grad_logits(rows: Tensor | slice, codes: Tensor | slice) -> Tensor:
        e = codebook[codes]
        s = z[rows] @ e.T
        through = torch.exp(s - lse[rows, None]) * (g[rows] @ e.T - delta[rows, None])
        log_p = s / TEMPERATURE - lse_tau[rows, None]
        spread = c[codes] - expected_c[rows, None] - log_p - entropy[rows, None]
        return through + log_p.exp() * spread / (n * TEMPERATURE)

    where = where or sample(indices, k)
    step = 2 / (n * d)
    grad_z = torch.cat([grad_logits(row[None], slice(None)) @ codebook for row in where.rows])
    # The first loss term pulls z directly, -2(z_q - z), and the second, -2(e - z): both from the code.
    grad_z = grad_z - 2 * step * (code - z)[where.rows]
    pull = torch.zeros_like(codebook).index_add_(0, indices, g + BETA * step * (code - z))
    found = {
        "quantization loss": (2 + BETA) * (code - z).square().mean(),
        "sample entropy": entropy.mean(),
        "codebook entropy": -(mean * torch.log(mean + EPSILON)).sum(),
        "gradient of z": grad_z,
    }
    for name, codes in (("selected codes", where.selected), ("other codes", where.others)):
        found[f"gradient of {name}"] = grad_logits(slice(None), codes).T @ z + pull[codes]
    return found, where


def cross_entropy(
    hidden: Tensor, head: Tensor, targets: Tensor, dtype: torch.dtype, where: Sample | None = None
) -> tuple[dict[str, Tensor], Sample]:
    """Loss and, on a sample, gradients of :func:`bench.eager.cross_entropy`."""
    lse = scores(hidden, head, dtype, None, 1.0).lse
    hidden, head = hidden.to(dtype), head.to(dtype)
    n = len(hidden)
    where = where or sample(targets, len(head))
    loss = (lse - (hidden * head[targets]).sum(dim=1)).mean()

    def grad_logits(rows: Tensor | slice, codes: Tensor) -> Tensor:
        p = torch.exp(hidden[rows] @ head[codes].T - lse[rows, None])
        return (p - (targets[rows, None] == codes).to(dtype)) / n

    every = torch.arange(len(head))
    found = {
        "loss": loss,
        "gradient of hidden": torch.cat([grad_logits(row[None], every) @ head for row in where.rows]),
    }
    for name, codes in (("target rows", where.selected), ("other rows", where.others)):
        found[f"gradient of {name}"] = grad_logits(slice(None), codes).T @ hidden
    return found, where
