"""Search, decoding and the training step over a codebook that is split over processes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ibq_fast.codebook_parallel.shards import CodebookShards
from ibq_fast.distributed import mean_over_all_rows
from ibq_fast.ops import checks, codebook_search
from ibq_fast.ops.blocks import Blocks, bias_with_norms
from ibq_fast.ops.entropy import entropy_of_mean
from ibq_fast.ops.shard import (
    RowConstants,
    ShardGradient,
    mean_probabilities,
    merge_statistics,
    partial_statistics,
)


class ParallelResult(NamedTuple):
    """Of the own rows: z_q, codes [N, D], indices [N] int64; sample and codebook entropy (0-dim)."""

    z_q: Tensor
    codes: Tensor
    indices: Tensor
    sample_entropy: Tensor
    codebook_entropy: Tensor


@torch.no_grad()
def parallel_search(
    shards: CodebookShards, z: Tensor, codebook: Tensor, *, scale: float, bias: Tensor | None
) -> Tensor:
    """Indices [N] into the whole codebook, of the own rows ``z`` [N, D]; ``codebook`` and ``bias`` are the
    own shard. Ties go to the lowest index. Raises ValueError like ``codebook_search``.
    """
    counts = shards.counts(z.shape[0])
    rows = shards.gather(z, counts)
    found = codebook_search(rows, codebook, scale=scale, bias=bias, exact=True).indices
    return _own(shards, _best_of_all(shards, rows, codebook, scale, bias, found), counts)


def parallel_decode(shards: CodebookShards, codebook: Tensor, indices: Tensor) -> Tensor:
    """Codes [N, D] of the own ``indices`` [N] int64 from everyone's shards, with the gather's gradient."""
    codes: Tensor = _Decode.apply(codebook, indices, shards)
    return codes


def parallel_index_backprop(
    shards: CodebookShards,
    z: Tensor,
    codebook: Tensor,
    *,
    temperature: float | None,
    scale: float = 1.0,
    bias: Tensor | None = None,
    norm_weight: float = 0.0,
    over_all_rows: bool = False,
) -> ParallelResult:
    """``index_backprop`` of the own rows ``z`` [N, D] over the whole codebook, of which ``codebook`` [K_r, D]
    and ``bias`` [K_r] are the own shard. Without a ``temperature`` the entropies are zeros. The codebook
    entropy is that of the own rows' mean p̄, or with ``over_all_rows`` that of all processes' rows.

    All processes of the group call it together, and go backward through it together. Numbers of rows may
    differ, and be 0. The indices are those of one process with the whole codebook, unless the logits of two
    codes differ by less than their rounding; equal codes are told apart by index.

    **Gradient.** With L_r the loss of rank r, dz is d(Σ_r L_r)/dz, as if one process computed all. The
    gradients of ``codebook`` and ``bias`` are those of Σ_r L_r too: who averages the gradients of other
    weights over processes divides the shard's by the number of processes as well.

    Travels, for N rows of all in total: z, their codes, the gradients of both outputs, dz (each N·D), and a
    few numbers a row. Raises ValueError for operands that do not fit, as ``index_backprop``.
    """
    checks.operands(z, codebook, bias, scale)
    wanted = z.requires_grad or codebook.requires_grad or (bias is not None and bias.requires_grad)
    differentiable = wanted and torch.is_grad_enabled()
    settings = _Settings(shards, scale, norm_weight, temperature, over_all_rows, differentiable)
    counts = shards.counts(z.shape[0])
    z_q, codes, indices, row_entropy, means = _Step.apply(z, codebook, bias, counts, settings)
    sample = row_entropy.sum() / max(z.shape[0], 1)
    if temperature is None:
        return ParallelResult(z_q, codes, indices, sample, torch.zeros_like(sample))
    if over_all_rows and shards.replicas is not None:
        means = mean_over_all_rows(means[0], sum(counts), shards.replicas).unsqueeze(0)
    parts = torch.stack([entropy_of_mean(mean) for mean in means])
    usage: Tensor = _SumOverShards.apply(parts, shards)
    return ParallelResult(z_q, codes, indices, sample, usage)


@dataclass(frozen=True)
class _Settings:
    shards: CodebookShards
    scale: float
    norm_weight: float
    temperature: float | None
    over_all_rows: bool
    differentiable: bool


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, z: Tensor, codebook: Tensor, bias: Tensor | None, counts: list[int], settings: _Settings
    ) -> tuple[Tensor, ...]:
        shards, temperature = settings.shards, settings.temperature
        rows = shards.gather(z, counts)
        whole_bias = bias_with_norms(codebook, bias, settings.norm_weight)
        blocks = Blocks(rows, codebook, whole_bias, settings.scale)
        part = partial_statistics(blocks, temperature, with_readout=settings.differentiable)
        constants, shares = merge_statistics(shards.each(part.packed()), temperature)
        indices = _best_of_all(shards, rows, codebook, settings.scale, whole_bias, part.code)
        codes = shards.sum_to_owners(_own_codes(shards, codebook, indices), counts)
        rows_of = _membership(blocks, counts, settings.over_all_rows)
        means = blocks.z.new_zeros((rows_of.shape[1], 0))
        if temperature is not None:
            means = mean_probabilities(blocks, rows_of, constants, temperature)
        if part.readout is not None:
            readout = part.readout.mul_(shares[shards.rank].unsqueeze(1))
            ctx.save_for_backward(rows, codebook, bias, indices, readout, rows_of, *constants)
        ctx.counts, ctx.settings = counts, settings
        own_indices = _own(shards, indices, counts).clone()
        ctx.mark_non_differentiable(own_indices)
        return codes, codes.clone(), own_indices, _own(shards, constants.row_entropy, counts).clone(), means

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_z_q, grad_codes, _, grad_row_entropy, grad_means = grads
        rows, codebook, bias, indices, readout, rows_of, *constants = ctx.saved_tensors
        settings: _Settings = ctx.settings
        shards, norm_weight = settings.shards, settings.norm_weight
        both = shards.gather(torch.cat([grad_z_q, grad_codes], dim=1), ctx.counts)
        grad_z_q, grad_codes = both.split(codebook.shape[1], dim=1)
        blocks = Blocks(rows, codebook, bias_with_norms(codebook, bias, norm_weight), settings.scale)
        out = ShardGradient(
            blocks,
            RowConstants(*constants),
            grad_z_q,
            readout,
            settings.temperature,
            shards.gather(grad_row_entropy, ctx.counts),
            grad_means,
            rows_of,
            shards.sum,
        )
        grad_z = shards.sum_to_owners(out.grad_z, ctx.counts).to(rows.dtype)
        own = ((indices >= shards.start) & (indices < shards.stop)).nonzero().squeeze(1)
        hard = (grad_z_q[own].to(blocks.dtype)).add_(grad_codes[own])
        out.grad_codebook.index_add_(0, indices[own] - shards.start, hard)
        if norm_weight != 0.0:
            slope = out.grad_bias.unsqueeze(1).to(blocks.dtype)
            out.grad_codebook.addcmul_(codebook.to(blocks.dtype), slope, value=-2.0 * norm_weight)
        grad_bias = out.grad_bias if bias is not None else None
        return grad_z, out.grad_codebook.to(codebook.dtype), grad_bias, None, None


class _SumOverShards(torch.autograd.Function):
    """Of everyone's [G] summed over the shards each gets its own entry; of [1], all get the one."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor, shards: CodebookShards) -> Tensor:
        ctx.shards, ctx.entries = shards, parts.shape[0]
        return shards.sum(parts.clone())[shards.rank if parts.shape[0] > 1 else 0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        everyone = ctx.shards.each(grads[0])
        return everyone if ctx.entries > 1 else everyone.sum(0, keepdim=True), None


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, codebook: Tensor, indices: Tensor, shards: CodebookShards) -> Tensor:
        counts = shards.counts(indices.shape[0])
        everyone = shards.gather(indices, counts)
        ctx.save_for_backward(everyone, codebook)
        ctx.shards, ctx.counts = shards, counts
        return shards.sum_to_owners(_own_codes(shards, codebook, everyone), counts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        indices, codebook = ctx.saved_tensors
        grad = ctx.shards.gather(grads[0], ctx.counts)
        own = ((indices >= ctx.shards.start) & (indices < ctx.shards.stop)).nonzero().squeeze(1)
        out = torch.zeros_like(codebook)
        return out.index_add_(0, indices[own] - ctx.shards.start, grad[own]), None, None


def _best_of_all(
    shards: CodebookShards,
    rows: Tensor,
    codebook: Tensor,
    scale: float,
    bias: Tensor | None,
    found: Tensor,
) -> Tensor:
    """Indices [N] into the whole codebook, from everyone's best code of its own.

    These few are scored once more in float64, where the device has it: two holders' kernels may round one
    and the same score differently.
    """
    wide = torch.float64 if rows.device.type != "npu" else torch.float32
    score = scale * (rows.to(wide) * codebook.index_select(0, found).to(wide)).sum(dim=1)
    if bias is not None:
        score += bias.index_select(0, found)
    scores, indices = shards.each(score), shards.each(found + shards.start)
    best = scores == scores.amax(0)
    lowest = indices.masked_fill(~best, shards.codebook_size).amin(0)
    return lowest.masked_fill(lowest == shards.codebook_size, 0)  # a row that holds a NaN


def _own_codes(shards: CodebookShards, codebook: Tensor, indices: Tensor) -> Tensor:
    """Codes [N, D] of the ``indices`` that lie in the own shard; zeros of the others."""
    mine = (indices >= shards.start) & (indices < shards.stop)
    codes = codebook.detach().index_select(0, (indices - shards.start).masked_fill(~mine, 0))
    return codes.masked_fill_(~mine.unsqueeze(1), 0.0)


def _membership(blocks: Blocks, counts: list[int], over_all_rows: bool) -> Tensor:
    """[N, G]: 1/N_g where row i is of group g: the processes, or one group of all."""
    if over_all_rows:
        return blocks.z.new_full((blocks.n, 1), 1.0 / max(blocks.n, 1))
    sizes = torch.tensor(counts, device=blocks.z.device)
    owner = torch.repeat_interleave(torch.arange(len(counts), device=blocks.z.device), sizes)
    share = 1.0 / sizes.clamp_min(1).to(blocks.dtype)
    return torch.zeros((blocks.n, len(counts)), dtype=blocks.dtype, device=blocks.z.device).scatter_(
        1, owner.unsqueeze(1), share[owner].unsqueeze(1)
    )


def _own(shards: CodebookShards, everyone: Tensor, counts: list[int]) -> Tensor:
    return everyone.split(counts)[shards.rank]
