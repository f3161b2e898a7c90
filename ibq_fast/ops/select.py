"""straight_through_select: the selected codes, with the gradient of index backpropagation.

Contract. S, z, codebook, bias, scale as in :mod:`ibq_fast.ops.search`, P = softmax(S), E the
codebook. Returns

- z_q [N, D] = E[indices]; its gradient g is that of a one-hot whose value is hard and whose derivative
  is that of P:
  δ_i = g_i · o_i,  dS_ij = P_ij (g_i·E_j - δ_i),  dz = scale · dS E,  dbias = column sums of dS,
  dE = scale · dSᵀ z + scatter-add of g by index,
- codes [N, D]: the same values as a plain gather; its gradient is a scatter-add into the codebook,
- indices [N] int64 (ties to the lowest); lse [N] and, in the statistics dtype, the readout o = P E [N, D],
  both kept for the backward; none of them differentiable.

Nothing of size N×K is stored. Cost in products of 2·N·K·D operations: forward 2, backward 4.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ibq_fast.ops import backends, checks, search
from ibq_fast.ops.blocks import Blocks, LogitGradient, RunningMaximum, statistics_dtype
from ibq_fast.ops.registration import (
    Operator,
    no_second_derivative,
    overload,
    register,
    save_nothing,
    saved_lse_dtype,
)

NAME = "straight_through_select"
BACKWARD = "straight_through_select_backward"


class SelectResult(NamedTuple):
    """z_q [N, D] (straight-through gradient), codes [N, D] (gather's gradient), indices [N] int64."""

    z_q: Tensor
    codes: Tensor
    indices: Tensor


def straight_through_select(
    z: Tensor,
    codebook: Tensor,
    *,
    scale: float = 1.0,
    bias: Tensor | None = None,
    backend: str | None = None,
) -> SelectResult:
    """Select a code for each row of ``z`` [N, D] from ``codebook`` [K, D], differentiably.

    ``z_q`` and ``codes`` hold the same values in the dtype of ``z``; they differ in their gradient (see the
    module). Without anything to differentiate only the search runs. Raises like ``codebook_search``.
    """
    checks.operands(z, codebook, bias, scale)
    wanted = z.requires_grad or codebook.requires_grad or (bias is not None and bias.requires_grad)
    if not (wanted and torch.is_grad_enabled()):
        op = backends.select(search.NAME, z.device.type, z.dtype, backend)
        indices = op(z, codebook, bias, float(scale), False)[0]
        return SelectResult(codebook.index_select(0, indices), codebook.index_select(0, indices), indices)
    op = backends.select(NAME, z.device.type, z.dtype, backend)
    z_q, codes, indices, _, _ = op(z, codebook, bias, float(scale))
    return SelectResult(z_q, codes, indices)


def reference(
    z: Tensor, codebook: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The formula itself, with one-hot and softmax [N, K] in memory; differentiable by autograd."""
    s = search.logits(z, codebook, bias, scale)
    soft = s.softmax(dim=1).to(z.dtype)
    indices = s.argmax(dim=1)
    hard = torch.zeros_like(soft).scatter_(1, indices.unsqueeze(1), 1.0)
    z_q = (hard - soft.detach() + soft) @ codebook
    return z_q, codebook[indices], indices, s.logsumexp(dim=1), soft @ codebook


def composite(
    z: Tensor, codebook: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    blocks = Blocks(z, codebook, bias, scale)
    maximum = RunningMaximum(blocks)
    total = blocks.new_rows()
    readout = torch.zeros_like(blocks.z, memory_format=torch.contiguous_format)
    for rows, codes, s, block in blocks:
        shift, growth = maximum.update(rows, codes, s)
        shrink = torch.exp(-growth)
        weight = s.sub_(shift.unsqueeze(1)).exp_()
        total[rows] = total[rows] * shrink + weight.sum(dim=1)
        readout[rows] = torch.addmm(readout[rows] * shrink.unsqueeze(1), weight, block)
    readout /= total.unsqueeze(1)
    indices = maximum.indices()
    lse = maximum.value + total.log()
    return codebook.index_select(0, indices), codebook.index_select(0, indices), indices, lse, readout


def composite_backward(
    grad_z_q: Tensor,
    grad_codes: Tensor,
    z: Tensor,
    codebook: Tensor,
    bias: Tensor | None,
    scale: float,
    indices: Tensor,
    lse: Tensor,
    readout: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    blocks = Blocks(z, codebook, bias, scale)
    out = LogitGradient(blocks)
    grad = grad_z_q.to(blocks.dtype)
    delta = (grad * readout).sum(dim=1, keepdim=True)
    for rows, codes, s, block in blocks:
        p = s.sub_(lse[rows].unsqueeze(1)).exp_()
        grad_s = torch.mm(grad[rows], block.T).sub_(delta[rows]).mul_(p)
        out.add(rows, codes, p, grad_s, block)
    out.finish()
    out.grad_codebook.index_add_(0, indices, grad + grad_codes.to(blocks.dtype))
    return out.grad_z.to(z.dtype), out.grad_codebook.to(codebook.dtype), out.grad_bias


def fake(
    namespace: str, z: Tensor, codebook: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    n, d = z.shape
    dtype = statistics_dtype(z.dtype)
    return (
        z.new_empty((n, d)),
        z.new_empty((n, d)),
        z.new_empty((n,), dtype=torch.int64),
        z.new_empty((n,), dtype=saved_lse_dtype(namespace, z.dtype)),
        z.new_empty((n, d), dtype=dtype),
    )


def fake_backward(
    namespace: str,
    grad_z_q: Tensor,
    grad_codes: Tensor,
    z: Tensor,
    codebook: Tensor,
    bias: Tensor | None,
    scale: float,
    indices: Tensor,
    lse: Tensor,
    readout: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    return fake_gradients(z, codebook, bias)


def fake_gradients(z: Tensor, codebook: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes of the gradients of z, codebook and bias ([0] without one)."""
    size = 0 if bias is None else codebook.shape[0]
    dtype = statistics_dtype(z.dtype)
    return z.new_empty(z.shape), codebook.new_empty(codebook.shape), z.new_empty((size,), dtype=dtype)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    z, codebook, bias, scale = inputs
    _, _, indices, lse, readout = output
    ctx.mark_non_differentiable(indices, lse, readout)
    ctx.save_for_backward(z, codebook, bias, indices, lse, readout)
    ctx.scale = scale


def backward(
    namespace: str,
    ctx: Any,
    grad_z_q: Tensor,
    grad_codes: Tensor,
    grad_indices: Tensor,
    grad_lse: Tensor,
    grad_readout: Tensor,
) -> tuple[Tensor, Tensor, Tensor | None, None]:
    z, codebook, bias, indices, lse, readout = ctx.saved_tensors
    grad_z, grad_codebook, grad_bias = overload(namespace, BACKWARD)(
        grad_z_q.contiguous(), grad_codes.contiguous(), z, codebook, bias, ctx.scale, indices, lse, readout
    )
    return grad_z, grad_codebook, None if bias is None else grad_bias, None


register(
    Operator(
        name=NAME,
        arguments="(Tensor z, Tensor codebook, Tensor? bias, float scale)"
        " -> (Tensor z_q, Tensor codes, Tensor indices, Tensor lse, Tensor readout)",
        composite=composite,
        fake=fake,
        setup_context=setup_context,
        backward=backward,
    )
)
register(
    Operator(
        name=BACKWARD,
        arguments="(Tensor grad_z_q, Tensor grad_codes, Tensor z, Tensor codebook, Tensor? bias, float scale,"
        " Tensor indices, Tensor lse, Tensor readout)"
        " -> (Tensor grad_z, Tensor grad_codebook, Tensor grad_bias)",
        composite=composite_backward,
        fake=fake_backward,
        setup_context=save_nothing,
        backward=no_second_derivative,
    )
)
backends.add(NAME, backends.FLOATS, also=(BACKWARD,))
