"""softmax_statistics and codebook_entropy: entropies of softmax(S/τ) over codes.

Contract. S, z, codebook, bias, scale as in :mod:`ibq_fast.ops.search`, p = softmax(S/τ), τ > 0.
The operator gives

- row_entropy [N]: H_i = -Σ_j p_ij log p_ij,  mean_prob [K]: mean of p over rows (zeros when N = 0),
- lse [N] of S/τ, kept for the backward and not differentiable; the former two in the statistics dtype.

With a and c the gradients of row_entropy and mean_prob,
dS_ij = (1/τ) p_ij [ -a_i (log p_ij + H_i) + (1/N)(c_j - Σ_k p_ik c_k) ]; entries with p = 0 give 0.

S/τ is formed in the statistics dtype whatever the operands are, so half precision cannot overflow. Nothing of
size N×K is stored. Cost in products of 2·N·K·D operations: forward 2, backward 4.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ibq_fast.ops import backends, checks, search
from ibq_fast.ops.blocks import FAR, Blocks, LogitGradient, RunningMaximum, statistics_dtype
from ibq_fast.ops.registration import (
    Operator,
    no_second_derivative,
    overload,
    register,
    save_nothing,
    saved_lse_dtype,
)
from ibq_fast.ops.select import fake_gradients

NAME = "softmax_statistics"
BACKWARD = "softmax_statistics_backward"


class EntropyResult(NamedTuple):
    """sample_entropy and codebook_entropy (0-dim, in nats), mean_prob [K]; in the statistics dtype."""

    sample_entropy: Tensor
    codebook_entropy: Tensor
    mean_prob: Tensor


def codebook_entropy(
    z: Tensor,
    codebook: Tensor,
    *,
    temperature: float,
    scale: float = 1.0,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    backend: str | None = None,
) -> EntropyResult:
    """Mean row entropy of p = softmax(S/τ), and the entropy -Σ p̄ log(p̄ + eps) of its mean p̄ over rows.

    Differentiable in ``z`` [N, D], ``codebook`` [K, D] and ``bias`` [K]. An empty batch gives zeros. Raises
    ValueError like ``codebook_search``, and for a temperature that is not positive.
    """
    checks.operands(z, codebook, bias, scale)
    checks.positive("temperature", temperature)
    op = backends.select(NAME, z.device.type, z.dtype, backend)
    row_entropy, mean_prob, _ = op(z, codebook, bias, float(scale), float(temperature))
    return summarize(row_entropy, mean_prob, eps)


def summarize(row_entropy: Tensor, mean_prob: Tensor, eps: float) -> EntropyResult:
    """The two entropies from the operator's statistics, in plain differentiable PyTorch."""
    sample = row_entropy.sum() / max(row_entropy.shape[0], 1)
    return EntropyResult(sample, entropy_of_mean(mean_prob, eps), mean_prob)


def entropy_of_mean(mean_prob: Tensor, eps: float = 1e-5) -> Tensor:
    """-Σ p̄ log(p̄ + eps) of ``mean_prob`` [K], 0-dim, in nats."""
    return -(mean_prob * torch.log(mean_prob + eps)).sum()


def reference(
    z: Tensor, codebook: Tensor, bias: Tensor | None, scale: float, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The formula itself, with softmax(S/τ) [N, K] in memory; differentiable by autograd."""
    s = search.logits(z, codebook, bias, scale) / temperature
    log_p = s.log_softmax(dim=1)
    p = log_p.exp()
    return -(p * log_p).sum(dim=1), p.mean(dim=0), s.logsumexp(dim=1)


def composite(
    z: Tensor, codebook: Tensor, bias: Tensor | None, scale: float, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    blocks = _tempered(z, codebook, bias, scale, temperature)
    maximum = RunningMaximum(blocks)
    total, spread = blocks.new_rows(), blocks.new_rows()
    for rows, codes, s, _ in blocks:
        shift, growth = maximum.update(rows, codes, s)
        below = s.neg_().add_(shift.unsqueeze(1)).clamp_max_(FAR)
        weight = torch.exp(-below)
        shrink = torch.exp(-growth)
        # Σ exp(s - max)(max - s): every term positive, so the entropy below is free of cancellation.
        spread[rows] = shrink * (spread[rows] + growth * total[rows]) + below.mul_(weight).sum(dim=1)
        total[rows] = shrink * total[rows] + weight.sum(dim=1)
    log_total = total.log()
    mean_prob = blocks.z.new_zeros(blocks.k)
    for rows, codes, s, _ in blocks:
        # Two subtractions: the rounding of max + log(total) would be a relative error of p.
        log_p = s.sub_(maximum.value[rows].unsqueeze(1)).sub_(log_total[rows].unsqueeze(1))
        mean_prob[codes] += log_p.exp_().sum(dim=0)
    row_entropy, lse = log_total + spread / total, maximum.value + log_total
    return row_entropy, mean_prob.div_(max(blocks.n, 1)), lse


def composite_backward(
    grad_row_entropy: Tensor,
    grad_mean_prob: Tensor,
    z: Tensor,
    codebook: Tensor,
    bias: Tensor | None,
    scale: float,
    temperature: float,
    lse: Tensor,
    row_entropy: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    blocks = _tempered(z, codebook, bias, scale, temperature)
    # Logits are taken relative to the mean of their row, lse - H: in flat rows lse would swamp them, in
    # peaked rows both are large. What rounding made of it and of the sum of p is measured by a first pass and
    # taken out; a constant taken off c changes nothing but the rounding.
    center = lse - row_entropy
    c = grad_mean_prob.to(blocks.dtype)
    c = (c - c.mean()) / max(blocks.n, 1)
    total, mean_c, mean_s = blocks.new_rows(), blocks.new_rows(), blocks.new_rows()
    for rows, codes, s, _ in blocks:
        s.sub_(center[rows].unsqueeze(1)).clamp_min_(-FAR)
        p = torch.exp(s - row_entropy[rows].unsqueeze(1))
        total[rows] += p.sum(dim=1)
        mean_c[rows] += torch.mv(p, c[codes])
        mean_s[rows] += p.mul_(s).sum(dim=1)
    mean_c, mean_s, log_total = mean_c / total, mean_s / total, row_entropy + total.log()
    a = grad_row_entropy.to(blocks.dtype).unsqueeze(1)
    out = LogitGradient(blocks)
    for rows, codes, s, block in blocks:
        s.sub_(center[rows].unsqueeze(1)).clamp_min_(-FAR)
        p = torch.exp(s - log_total[rows].unsqueeze(1))
        grad = s.sub_(mean_s[rows].unsqueeze(1)).mul_(-a[rows])
        grad.add_(c[codes]).sub_(mean_c[rows].unsqueeze(1)).mul_(p)
        out.add(rows, codes, p, grad, block)
    out.finish()
    return out.grad_z.to(z.dtype), out.grad_codebook.to(codebook.dtype), out.grad_bias.div_(temperature)


def _tempered(z: Tensor, codebook: Tensor, bias: Tensor | None, scale: float, temperature: float) -> Blocks:
    """Blocks of S/τ. The scale brings 1/τ into the gradients of z and codebook, but not into the bias's."""
    dtype = statistics_dtype(z.dtype)
    return Blocks(z, codebook, None if bias is None else bias.to(dtype) / temperature, scale / temperature)


def fake(
    namespace: str, z: Tensor, codebook: Tensor, bias: Tensor | None, scale: float, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = statistics_dtype(z.dtype)
    n, k = z.shape[0], codebook.shape[0]
    lse = z.new_empty((n,), dtype=saved_lse_dtype(namespace, z.dtype))
    return z.new_empty((n,), dtype=dtype), z.new_empty((k,), dtype=dtype), lse


def fake_backward(
    namespace: str,
    grad_row_entropy: Tensor,
    grad_mean_prob: Tensor,
    z: Tensor,
    codebook: Tensor,
    bias: Tensor | None,
    scale: float,
    temperature: float,
    lse: Tensor,
    row_entropy: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    return fake_gradients(z, codebook, bias)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    z, codebook, bias, scale, temperature = inputs
    row_entropy, _, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(z, codebook, bias, lse, row_entropy)
    ctx.scale, ctx.temperature = scale, temperature


def backward(
    namespace: str, ctx: Any, grad_row_entropy: Tensor, grad_mean_prob: Tensor, grad_lse: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, None, None]:
    z, codebook, bias, lse, row_entropy = ctx.saved_tensors
    grad_z, grad_codebook, grad_bias = overload(namespace, BACKWARD)(
        grad_row_entropy.contiguous(),
        grad_mean_prob.contiguous(),
        z,
        codebook,
        bias,
        ctx.scale,
        ctx.temperature,
        lse,
        row_entropy,
    )
    return grad_z, grad_codebook, None if bias is None else grad_bias, None, None


register(
    Operator(
        name=NAME,
        arguments="(Tensor z, Tensor codebook, Tensor? bias, float scale, float temperature)"
        " -> (Tensor row_entropy, Tensor mean_prob, Tensor lse)",
        composite=composite,
        fake=fake,
        setup_context=setup_context,
        backward=backward,
    )
)
register(
    Operator(
        name=BACKWARD,
        arguments="(Tensor grad_row_entropy, Tensor grad_mean_prob, Tensor z, Tensor codebook, Tensor? bias,"
        " float scale, float temperature, Tensor lse, Tensor row_entropy)"
        " -> (Tensor grad_z, Tensor grad_codebook, Tensor grad_bias)",
        composite=composite_backward,
        fake=fake_backward,
        setup_context=save_nothing,
        backward=no_second_derivative,
    )
)
backends.add(NAME, backends.FLOATS, also=(BACKWARD,))
