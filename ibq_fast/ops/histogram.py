"""code_histogram: how often each code was selected.

Contract. indices [N] int64, each in [0, K); returns int64 [K] with counts. Not differentiable, exact.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ibq_fast.ops import backends, checks
from ibq_fast.ops.registration import Operator, no_second_derivative, register

NAME = "code_histogram"


def code_histogram(indices: Tensor, codebook_size: int, *, backend: str | None = None) -> Tensor:
    """Counts of each code in ``indices`` (integers in [0, codebook_size), any shape): int64 [codebook_size].

    Raises ValueError for non-integer indices, a size below 1, and (on the CPU) an index out of range.
    """
    checks.code_indices(indices, codebook_size)
    op = backends.select(NAME, indices.device.type, torch.int64, backend)
    return op(indices.reshape(-1).to(torch.int64), codebook_size)


def reference(indices: Tensor, codebook_size: int) -> Tensor:
    """The formula itself, with the one-hot [N, K] in memory."""
    return (indices.unsqueeze(1) == torch.arange(codebook_size, device=indices.device)).sum(dim=0)


def composite(indices: Tensor, codebook_size: int) -> Tensor:
    counts = torch.zeros(codebook_size, dtype=torch.int64, device=indices.device)
    return counts.scatter_add_(0, indices, torch.ones_like(indices))


def fake(namespace: str, indices: Tensor, codebook_size: int) -> Tensor:
    return indices.new_empty((codebook_size,), dtype=torch.int64)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.mark_non_differentiable(output)


register(
    Operator(
        name=NAME,
        arguments="(Tensor indices, int codebook_size) -> Tensor",
        composite=composite,
        fake=fake,
        setup_context=setup_context,
        backward=no_second_derivative,
    )
)
backends.add(NAME, (torch.int64,))
