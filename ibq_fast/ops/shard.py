"""index_backprop over a part of the codes: what each holder of some rows of a codebook computes.

Contract. S = scale · z @ codebook.T + bias as in :mod:`ibq_fast.ops.search`, with ``codebook`` [K_r, D] and
``bias`` [K_r] the rows that one process holds, and z [N, D] the same on all. The formulas are those of
:mod:`ibq_fast.ops.index_backprop` over all K codes: P = softmax(S) and p = softmax(S/τ) are normalised over
the whole codebook. So a step has phases, and what a phase needs of the other holders is merged in between:

1. :func:`partial_statistics`: maxima and sums of the own codes; :func:`merge_statistics` makes of everyone's
   the constants of whole rows (:class:`RowConstants`) and each holder's shares of a row,
2. :func:`mean_probabilities`: p̄ of the own codes,
3. :class:`ShardGradient`: dS of the own codes. It needs three sums over all codes of each row: δ_i = g_i·o_i
   and Σ_k p_ik c_k before it, and the rest of rows that one code has nearly whole after it.

Logits are taken relative to the row's greatest one, S - max, and log-sum-exps are kept as log Σ exp(S - max),
so that float32 loses nothing where S/τ is large. Nothing of size N×K_r is stored. Cost in products of
2·N·K_r·D operations: forward 3, backward 5 (2 and 4 without entropies), in chunked PyTorch on any device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ibq_fast.ops.blocks import FAR, Blocks, LogitGradient, RunningMaximum, Winners

SumOverShards = Callable[[Tensor], Tensor]


class PartialStatistics(NamedTuple):
    """Of the own codes, per row: greatest logit and its code (of the own ones), Σ exp(S - best), the same of
    S/τ, Σ exp((S - best)/τ)(best - S)/τ (both zeros without a temperature), and Σ exp(S - best) E [N, D].
    """

    best: Tensor
    code: Tensor
    total: Tensor
    total_tau: Tensor
    spread: Tensor
    readout: Tensor | None

    def packed(self) -> Tensor:
        """What others need of it: [4, N]."""
        return torch.stack([self.best, self.total, self.total_tau, self.spread])


class RowConstants(NamedTuple):
    """Of whole rows [N]: greatest logit, log Σ exp(S - best), log Σ exp((S - best)/τ), entropy of p."""

    best: Tensor
    log_total: Tensor
    log_total_tau: Tensor
    row_entropy: Tensor


def partial_statistics(blocks: Blocks, temperature: float | None, *, with_readout: bool) -> PartialStatistics:
    """Phase 1. Without a ``temperature`` nothing of the entropies is computed."""
    maximum = RunningMaximum(blocks)
    total, total_tau, spread = blocks.new_rows(), blocks.new_rows(), blocks.new_rows()
    readout = torch.zeros_like(blocks.z, memory_format=torch.contiguous_format) if with_readout else None
    for rows, codes, s, block in blocks:
        shift, growth = maximum.update(rows, codes, s)
        s.sub_(shift.unsqueeze(1))
        if temperature is not None:
            below = (s / -temperature).clamp_max_(FAR)
            weight = torch.exp(-below)
            rise = (growth / temperature).clamp_max_(FAR)
            shrink = torch.exp(-rise)
            spread[rows] = shrink * (spread[rows] + rise * total_tau[rows]) + below.mul_(weight).sum(dim=1)
            total_tau[rows] = shrink * total_tau[rows] + weight.sum(dim=1)
        weight = s.exp_()
        shrink = torch.exp(-growth)
        total[rows] = shrink * total[rows] + weight.sum(dim=1)
        if readout is not None:
            readout[rows] = torch.addmm(readout[rows] * shrink.unsqueeze(1), weight, block)
    return PartialStatistics(maximum.value, maximum.indices(), total, total_tau, spread, readout)


def merge_statistics(parts: Tensor, temperature: float | None) -> tuple[RowConstants, Tensor]:
    """Whole rows' constants from all holders' ``packed`` statistics [R, 4, N]; and exp(best_r - best) / Σ
    [R, N], which turn each holder's ``readout`` into its part of P·E.
    """
    bests, totals, totals_tau, spreads = parts.unbind(1)
    best = bests.amax(0)
    rise = (best - bests).clamp_max_(FAR)
    shrink = torch.exp(-rise)
    total = (shrink * totals).sum(0)
    row_entropy = log_total_tau = torch.zeros_like(best)
    if temperature is not None:
        rise = (rise / temperature).clamp_max_(FAR)
        shrink_tau = torch.exp(-rise)
        total_tau = (shrink_tau * totals_tau).sum(0)
        spread = (shrink_tau * (spreads + rise * totals_tau)).sum(0)
        log_total_tau = total_tau.log()
        row_entropy = log_total_tau + spread / total_tau
    return RowConstants(best, total.log(), log_total_tau, row_entropy), shrink / total


def mean_probabilities(
    blocks: Blocks, rows_of: Tensor, constants: RowConstants, temperature: float
) -> Tensor:
    """Phase 2: Σ_i rows_of[i, g] p_ij [G, K_r]; ``rows_of`` [N, G] holds 1/N_g for rows of group g."""
    means = blocks.z.new_zeros((rows_of.shape[1], blocks.k))
    for rows, codes, s, _ in blocks:
        log_p = _log_p(s, rows, constants, temperature)
        means[:, codes].addmm_(rows_of[rows].T, log_p.exp_())
    return means


class ShardGradient:
    """Phase 3. After construction ``grad_z`` [N, D] is the own codes' part of dz; ``grad_codebook`` and
    ``grad_bias`` of the own codes are whole, but for the hard path's scatter-add and the norms' share.

    grad_z_q [N, D]; readout [N, D]: the own part of P·E. grad_row_entropy [N], grad_means [G, K_r] and
    rows_of [N, G] as in phase 2: the entropies' (``temperature`` None: none). ``over_shards`` adds a tensor
    up over all holders; it is called twice, at the same places everywhere.
    """

    def __init__(
        self,
        blocks: Blocks,
        constants: RowConstants,
        grad_z_q: Tensor,
        readout: Tensor,
        temperature: float | None,
        grad_row_entropy: Tensor,
        grad_means: Tensor,
        rows_of: Tensor,
        over_shards: SumOverShards,
    ) -> None:
        grad = grad_z_q.to(blocks.dtype)
        c = grad_means.to(blocks.dtype)
        dots = blocks.new_rows()
        if temperature is not None:
            for rows, codes, s, _ in blocks:
                p = _log_p(s, rows, constants, temperature).exp_()
                dots[rows] += p.mul_(rows_of[rows] @ c[:, codes]).sum(dim=1)
        delta, dots = over_shards(torch.stack([(grad * readout).sum(dim=1), dots])).unsqueeze(2)
        slope = -grad_row_entropy.to(blocks.dtype).unsqueeze(1)
        entropy = constants.row_entropy.unsqueeze(1)
        selects, entropies = Winners(blocks), Winners(blocks)
        out = LogitGradient(blocks)
        for rows, codes, s, block in blocks:
            p = (s - constants.best[rows].unsqueeze(1)).sub_(constants.log_total[rows].unsqueeze(1)).exp_()
            grad_s = torch.mm(grad[rows], block.T).sub_(delta[rows]).mul_(p)
            selects.leave_out(rows, codes, p, grad_s)
            if temperature is not None:
                log_p = _log_p(s, rows, constants, temperature)
                p = torch.exp(log_p, out=p)
                grad_p = log_p.clamp_min_(-FAR).add_(entropy[rows]).mul_(slope[rows])
                grad_p.addmm_(rows_of[rows], c[:, codes]).sub_(dots[rows]).mul_(p).div_(temperature)
                entropies.leave_out(rows, codes, p, grad_p)
                grad_s += grad_p
            out.accumulate(rows, codes, grad_s, block)
        rests = over_shards(torch.stack([selects.rest, entropies.rest]))
        out.settle(selects, rests[0])
        out.settle(entropies, rests[1])
        self.grad_z, self.grad_codebook, self.grad_bias = out.grad_z, out.grad_codebook, out.grad_bias


def _log_p(s: Tensor, rows: slice, constants: RowConstants, temperature: float) -> Tensor:
    """log softmax(S/τ) of a block of S, in its place."""
    s.sub_(constants.best[rows].unsqueeze(1)).div_(temperature)
    return s.sub_(constants.log_total_tau[rows].unsqueeze(1))
