"""codebook_search: the best code of every row, and the row's log-sum-exp.

Contract. S = scale · z @ codebook.T + bias, with z [N, D] and codebook [K, D] of one dtype (float32,
bfloat16, float16; float64 on the composite backend), bias [K] float32 (float64 with float64) or None; N ≥ 0,
K ≥ 1, D ≥ 1, any strides. Returns

- indices [N] int64: argmax over codes, ties to the lowest index; 0 in a row that holds a NaN,
- max [N]: the largest logit, lse [N]: log Σ_j exp S_ij (shape [0] unless asked for); float32, or float64
  with float64.

S is never stored. Cost: one product of 2·N·K·D operations. Nothing is differentiable.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ibq_fast.ops import backends, checks
from ibq_fast.ops.blocks import Blocks, RunningMaximum, statistics_dtype
from ibq_fast.ops.registration import Operator, no_second_derivative, register

NAME = "codebook_search"


class SearchResult(NamedTuple):
    """indices [N] int64, max [N] and lse [N] (None unless asked for) in the statistics dtype."""

    indices: Tensor
    max: Tensor
    lse: Tensor | None


def codebook_search(
    z: Tensor,
    codebook: Tensor,
    *,
    scale: float = 1.0,
    bias: Tensor | None = None,
    with_lse: bool = False,
    backend: str | None = None,
) -> SearchResult:
    """The best code of each row of ``z`` [N, D] in ``codebook`` [K, D] under S = scale · z·E + bias.

    Not differentiable. Ties go to the lowest index. Raises ValueError for shapes, dtypes or devices that do
    not fit, for a NaN or infinity in a CPU ``z``, and for a forced backend that cannot serve the call.
    """
    checks.operands(z, codebook, bias, scale)
    op = backends.select(NAME, z.device.type, z.dtype, backend)
    indices, best, lse = op(z, codebook, bias, float(scale), with_lse)
    return SearchResult(indices, best, lse if with_lse else None)


def reference(
    z: Tensor, codebook: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The formula itself, with S [N, K] in memory."""
    s = logits(z, codebook, bias, scale)
    best, indices = s.max(dim=1)
    return indices, best, s.logsumexp(dim=1)


def logits(z: Tensor, codebook: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """S [N, K] in the dtype of the operands (float32 or wider where a bias joins)."""
    s = scale * (z @ codebook.T)
    return s if bias is None else s + bias


def composite(
    z: Tensor, codebook: Tensor, bias: Tensor | None, scale: float, with_lse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    blocks = Blocks(z, codebook, bias, scale)
    maximum = RunningMaximum(blocks)
    total = blocks.new_rows()
    for rows, codes, s, _ in blocks:
        shift, growth = maximum.update(rows, codes, s)
        if with_lse:
            part = s.sub_(shift.unsqueeze(1)).exp_().sum(dim=1)
            total[rows] = total[rows] * torch.exp(-growth) + part
    lse = maximum.value + total.log() if with_lse else total.new_empty(0)
    return maximum.indices(), maximum.value, lse


def fake(
    namespace: str, z: Tensor, codebook: Tensor, bias: Tensor | None, scale: float, with_lse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    n = z.shape[0]
    dtype = statistics_dtype(z.dtype)
    return (
        z.new_empty((n,), dtype=torch.int64),
        z.new_empty((n,), dtype=dtype),
        z.new_empty((n if with_lse else 0,), dtype=dtype),
    )


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output)


register(
    Operator(
        name=NAME,
        arguments="(Tensor z, Tensor codebook, Tensor? bias, float scale, bool with_lse)"
        " -> (Tensor indices, Tensor max, Tensor lse)",
        composite=composite,
        fake=fake,
        setup_context=setup_context,
        backward=no_second_derivative,
    )
)
backends.add(NAME, backends.FLOATS)
