"""Every operator as one call from leaves to outputs and gradients, for the tests that compare calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ibq_fast import ops

TAU = 0.1


def targets(x: Any) -> Tensor:
    """A class for each row of ``x``, every fifth row ignored."""
    rows = torch.arange(len(x.z), device=x.z.device)
    return torch.where(rows % 5 == 0, -100, rows * 7 % len(x.codebook))


def _search(x: Any, backend: str) -> tuple[Tensor, ...]:
    out = ops.codebook_search(x.z, x.codebook, bias=x.bias, scale=x.scale, with_lse=True, backend=backend)
    return tuple(value for value in out if value is not None)


def _select(x: Any, backend: str) -> tuple[Tensor, ...]:
    leaves = x.leaves()
    out = ops.straight_through_select(leaves[0], leaves[1], bias=leaves[2], scale=x.scale, backend=backend)
    total = (out.z_q * x.grad_z_q).sum() + (out.codes * x.grad_codes).sum()
    return out.indices, out.z_q.detach(), *_gradients(total, leaves)


def _entropy(x: Any, backend: str) -> tuple[Tensor, ...]:
    leaves = x.leaves()
    out = ops.codebook_entropy(
        leaves[0], leaves[1], bias=leaves[2], scale=x.scale, temperature=TAU, backend=backend
    )
    total = 2 * out.sample_entropy - out.codebook_entropy
    return out.sample_entropy.detach(), out.mean_prob.detach(), *_gradients(total, leaves)


def _index_backprop(x: Any, backend: str) -> tuple[Tensor, ...]:
    leaves = x.leaves()
    out = ops.index_backprop(
        leaves[0], leaves[1], bias=leaves[2], scale=x.scale, temperature=TAU, norm_weight=0.3, backend=backend
    )
    total = (out.z_q * x.grad_z_q).sum() + (out.codes * x.grad_codes).sum()
    total = total + 2 * out.sample_entropy - out.codebook_entropy
    return out.indices, out.mean_prob.detach(), *_gradients(total, leaves)


def _cross_entropy(x: Any, backend: str) -> tuple[Tensor, ...]:
    leaves = x.leaves()
    loss = ops.linear_cross_entropy(
        leaves[0],
        leaves[1],
        targets(x),
        bias=leaves[2],
        label_smoothing=0.1,
        reduction="none",
        backend=backend,
    )
    return loss.detach(), *_gradients((loss * x.grad_rows).sum(), leaves)


def _histogram(x: Any, backend: str) -> tuple[Tensor, ...]:
    indices = torch.arange(len(x.z), device=x.z.device) * 3 % len(x.codebook)
    return (ops.code_histogram(indices, len(x.codebook), backend=backend),)


def _gradients(total: Tensor, leaves: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(total, [leaf for leaf in leaves if leaf is not None])


CALLS: dict[str, Callable[[Any, str], tuple[Tensor, ...]]] = {
    "codebook_search": _search,
    "straight_through_select": _select,
    "softmax_statistics": _entropy,
    "index_backprop": _index_backprop,
    "linear_cross_entropy": _cross_entropy,
    "code_histogram": _histogram,
}
