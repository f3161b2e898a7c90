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
SAMPLED_ROWS = 32
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
    free = torch.ones(k, dtype=torch.bool, device=indices.device)
    free[used] = False
    others = free.nonzero().squeeze(1)

    def some(values: Tensor, count: int) -> Tensor:
        return values[torch.randperm(len(values), generator=random)[:count].to(values.device)]

    rows = torch.arange(len(indices), device=indices.device)
    return Sample(some(rows, SAMPLED_ROWS), some(used, SAMPLED_CODES), some(others, SAMPLED_CODES))


@dataclass
class _Rows:
    """Statistics of every row: best logit, logarithms of the sums of exp(S - best) and of exp((S - best)/τ),
    entropy, best code, softmax(S) E; and the mean of softmax(S/τ) over rows [K]."""

    best: Tensor
    log_sum: Tensor
    log_sum_tau: Tensor
    entropy: Tensor
    indices: Tensor
    readout: Tensor
    mean: Tensor


def _row_statistics(z: Tensor, codebook: Tensor) -> _Rows:
    n, k = len(z), len(codebook)
    best, log_sum, log_sum_tau, entropy = (z.new_empty(n) for _ in range(4))
    indices, readout = torch.empty(n, dtype=torch.int64, device=z.device), torch.empty_like(z)
    mean = z.new_zeros(k)
    for rows in _blocks(n, k):
        s = z[rows] @ codebook.T
        best[rows], indices[rows] = s.max(dim=1)
        s -= best[rows, None]
        p = s.exp()
        total = p.sum(dim=1)
        log_sum[rows], readout[rows] = total.log(), (p @ codebook) / total[:, None]
        s /= TEMPERATURE
        p = s.exp()
        total = p.sum(dim=1)
        mean += (p / total[:, None]).sum(dim=0) / n
        log_sum_tau[rows] = total.log()
        entropy[rows] = total.log() - s.mul_(p).sum(dim=1) / total
    return _Rows(best, log_sum, log_sum_tau, entropy, indices, readout, mean)


def quantizer_step(
    z: Tensor, codebook: Tensor, upstream: Tensor, dtype: torch.dtype, where: Sample | None = None
) -> tuple[dict[str, Tensor], Sample]:
    """Losses, and gradients of :func:`bench.eager.objective` on a sample, by the formulas of
    docs/architecture.md, equations (1) to (5); ``where`` repeats an earlier sample."""
    z, codebook, upstream = (t.to(dtype) for t in (z, codebook, upstream))
    (n, d), k = z.shape, len(codebook)
    st = _row_statistics(z, codebook)
    where = where or sample(st.indices, k)
    step = 2 / (n * d)
    code = codebook[st.indices]
    g = upstream + step * (code - z)
    delta = (g * st.readout).sum(dim=1)
    c = torch.log(st.mean + EPSILON) + st.mean / (st.mean + EPSILON)

    def grad_logits(below: Tensor, rows: Tensor, e: Tensor, c_of_codes: Tensor, mean_c: Tensor) -> Tensor:
        """dS of rows and codes e; below: S - best."""
        p = torch.exp(below - st.log_sum[rows, None])
        through = p * (g[rows] @ e.T - delta[rows, None])
        log_p = below / TEMPERATURE - st.log_sum_tau[rows, None]
        spread = c_of_codes - mean_c[:, None] - log_p - st.entropy[rows, None]
        return through + log_p.exp() * spread / (n * TEMPERATURE)

    pull = torch.zeros_like(codebook).index_add_(0, st.indices, g + BETA * step * (code - z))
    codes = torch.cat([where.selected, where.others])
    grad_codes = pull[codes]
    # The first loss term pulls z directly, -2(z_q - z), and the second, -2(e - z): both from the code.
    grad_z = -2 * step * (code - z)
    sampled = torch.zeros(n, dtype=torch.bool, device=z.device)
    sampled[where.rows] = True
    for block in _blocks(n, k):
        below = z[block] @ codebook.T - st.best[block, None]
        mean_c = torch.exp(below / TEMPERATURE - st.log_sum_tau[block, None]) @ c
        rows = torch.arange(n, device=z.device)[block]
        grad_codes += grad_logits(below[:, codes], rows, codebook[codes], c[codes], mean_c).T @ z[block]
        here = sampled[block]
        grad_z[rows[here]] += grad_logits(below[here], rows[here], codebook, c, mean_c[here]) @ codebook
    return {
        "quantization loss": (2 + BETA) * (code - z).square().mean(),
        "sample entropy": st.entropy.mean(),
        "codebook entropy": -(st.mean * torch.log(st.mean + EPSILON)).sum(),
        "gradient of z": grad_z[where.rows],
        "gradient of selected codes": grad_codes[: len(where.selected)],
        "gradient of other codes": grad_codes[len(where.selected) :],
    }, where


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

    every = torch.arange(len(head), device=head.device)
    found = {
        "loss": loss,
        "gradient of hidden": grad_logits(where.rows, every) @ head,
    }
    for name, codes in (("target rows", where.selected), ("other rows", where.others)):
        found[f"gradient of {name}"] = grad_logits(slice(None), codes).T @ hidden
    return found, where
