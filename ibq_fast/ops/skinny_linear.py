"""skinny_linear: a linear layer for a few rows whose results do not depend on how many rows there are.

Contract. x [M, C] float32 (float64 with float64 weights), weight [N, C] of float32, bfloat16, float16,
float64 (composite alone) or int8, row-major; scale [N] float32 with int8 weights and only with those; bias
[N] of the dtype of x, or None. Returns scale · (x weightᵀ) + bias as float32 (float64) [M, N]. M ≥ 0, N ≥
1, C ≥ 1. Not differentiable.

Sums are float32. Beside bfloat16 weights x is rounded to bfloat16 where the CPU multiplies pairs of it
(AVX512-BF16) and on the composite backend; elsewhere it stays float32. int8 weights meet float32 x.

Row i of the result is a function of row i of x and of the weights: on the native backend bit for bit, for
any M and any number of threads. The composite backend gets as near as a library lets it, see
:data:`ROW_GROUP`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ibq_fast.ops import backends
from ibq_fast.ops.registration import Operator, register

NAME = "skinny_linear"
DTYPES = (*backends.FLOATS, torch.int8)

ROW_GROUP = 8
"""Rows are padded to a multiple of this on the composite backend. BLAS libraries choose other kernels, with
another order of summation, for a handful of rows, also for what a thread's share leaves over. On an AMD
EPYC with MKL (1 and 2 threads) each row of a product has the same bits for 8, 16, 24, ... rows, and others
for 1, 2, 3 or 9."""


def skinny_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """``F.linear(x, weight, bias)`` for few rows; see the module for dtypes and what is promised.

    Raises ValueError for shapes, dtypes or devices that do not fit and a forced backend that cannot serve.
    """
    check(x, weight, scale, bias)
    op = backends.select(NAME, x.device.type, weight.dtype, backend)
    return op(x.contiguous(), weight.contiguous(), scale, bias)


def check(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> None:
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1] or weight.numel() == 0:
        raise ValueError(
            f"weight: expected [N, C] beside x [M, C], got {list(weight.shape)} and {list(x.shape)}"
        )
    if weight.dtype not in DTYPES:
        raise ValueError(f"weight: expected one of {', '.join(map(str, DTYPES))}, got {weight.dtype}")
    expected = torch.float64 if weight.dtype == torch.float64 else torch.float32
    if x.dtype != expected:
        raise ValueError(f"x: expected {expected} beside {weight.dtype} weights, got {x.dtype}")
    if (scale is None) == (weight.dtype == torch.int8):
        raise ValueError("scale: expected [N] with int8 weights, and only with those")
    for name, vector in (("scale", scale), ("bias", bias)):
        if vector is not None and (vector.shape != weight.shape[:1] or vector.dtype != expected):
            raise ValueError(
                f"{name}: expected {expected} [{weight.shape[0]}], got {vector.dtype} {list(vector.shape)}"
            )
    for name, other in (("weight", weight), ("scale", scale), ("bias", bias)):
        if other is not None and other.device != x.device:
            raise ValueError(f"{name}: expected on {x.device} as x, got {other.device}")


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [N, C] as int8 [N, C] and scale float32 [N]: symmetric, the largest of a row becoming 127."""
    rows = weight.float()
    scale = rows.abs().amax(dim=1) / 127
    steps = rows / torch.where(scale > 0, scale, 1.0).unsqueeze(1)
    return steps.round_().to(torch.int8), scale


def grouped(x: Tensor, weight: Tensor, scale: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """The product in plain PyTorch, in the dtype of x (which a float weight shares); int8 is widened
    first."""
    rows = x.shape[0]
    if x.is_cpu:
        x = F.pad(x, (0, 0, 0, -rows % ROW_GROUP))
    out = F.linear(x, weight.to(x.dtype))[:rows]
    out = out if scale is None else out * scale.to(out.dtype)
    return out if bias is None else out + bias


def composite(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    product = grouped(x.to(x.dtype if scale is not None else weight.dtype), weight, scale)
    product = product.to(x.dtype)
    return product.clone() if bias is None else product + bias


def fake(namespace: str, x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


register(
    Operator(
        name=NAME,
        arguments="(Tensor x, Tensor weight, Tensor? scale, Tensor? bias) -> Tensor",
        composite=composite,
        fake=fake,
    )
)
backends.add(NAME, DTYPES, names=("native", "composite"))
