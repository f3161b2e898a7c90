"""skinny_linear: error ratio over ragged shapes, bits of a row, what is refused; opcheck of both
operators."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ibq_fast.ops import available_backends, registration
from ibq_fast.ops.skinny_linear import quantize_rows, skinny_linear

BACKENDS = ["native", "composite"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int8]


def operands(m: int, n: int, c: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    random = torch.Generator().manual_seed(m + n + c)
    x, weight = torch.randn(m, c, generator=random), torch.randn(n, c, generator=random)
    bias = torch.randn(n, generator=random)
    if dtype == torch.int8:
        return x, *quantize_rows(weight), bias
    return x, weight.to(dtype), None, bias


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (2, 97, 100), (6, 13, 1025), (16, 64, 64), (23, 3, 31)], ids=str
)
def test_error_ratio(shape: tuple[int, int, int], dtype: torch.dtype, backend: str) -> None:
    x, weight, scale, bias = operands(*shape, dtype)
    truth = x.double() @ weight.double().T
    truth = bias + (truth if scale is None else truth * scale)
    eager_dtype = torch.float32 if scale is not None else dtype
    eager = (x.to(eager_dtype) @ weight.to(eager_dtype).T).double() * (1.0 if scale is None else scale) + bias
    got = skinny_linear(x, weight, scale, bias, backend=backend).double()
    floor = 4 * 2**-23 * truth.norm()
    assert (got - truth).norm() <= 2 * (eager - truth).norm() + floor
    assert (skinny_linear(x, weight, scale, backend=backend) + bias - got).norm() <= floor


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_native_rows_have_the_same_bits_in_any_batch(dtype: torch.dtype) -> None:
    x, weight, scale, bias = operands(37, 75, 203, dtype)
    together = skinny_linear(x, weight, scale, bias, backend="native")
    for size in range(1, 14):
        parts = [
            skinny_linear(x[i : i + size], weight, scale, bias, backend="native") for i in range(0, 37, size)
        ]
        assert torch.equal(torch.cat(parts), together)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows_other_strides_and_int8_extremes(backend: str) -> None:
    x, weight, _, _ = operands(5, 9, 40, torch.float32)
    assert skinny_linear(x[:0], weight, backend=backend).shape == (0, 9)
    strided = skinny_linear(x.T.contiguous().T, weight.T.contiguous().T, backend=backend)
    assert torch.equal(strided, skinny_linear(x, weight, backend=backend))
    zeros = torch.cat((torch.zeros(1, 40), torch.full((1, 40), -3.0)))
    quantized, scale = quantize_rows(zeros)
    assert quantized.min() == -127
    got = skinny_linear(torch.ones(1, 40), quantized, scale, backend=backend)
    torch.testing.assert_close(got, torch.tensor([[0.0, -120.0]]))


def test_nan_stays_nan() -> None:
    x, weight, _, _ = operands(3, 20, 33, torch.float32)
    x[1, 32] = torch.nan
    got = skinny_linear(x, weight, backend="native")
    assert bool(got[1].isnan().all())
    assert not bool(got[[0, 2]].isnan().any())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 5)}, r"weight: expected \[N, C\] beside x"),
        ({"x": torch.zeros(2, 4).double()}, "x: expected torch.float32 beside torch.float32 weights"),
        ({"weight": torch.zeros(3, 4, dtype=torch.int64)}, "weight: expected one of"),
        ({"weight": torch.zeros(3, 4, dtype=torch.int8)}, "scale: expected .* with int8 weights"),
        ({"scale": torch.zeros(3)}, "scale: expected .* only with those"),
        ({"bias": torch.zeros(4)}, r"bias: expected torch.float32 \[3\]"),
        ({"backend": "triton"}, "cannot serve skinny_linear"),
    ],
    ids=str,
)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        skinny_linear(**({"x": torch.zeros(2, 4), "weight": torch.zeros(3, 4)} | change))


@pytest.mark.parametrize("namespace", [registration.NAMESPACES[name] for name in available_backends()])
def test_opcheck(namespace: str) -> None:
    library = getattr(torch.ops, namespace)
    for dtype in DTYPES:
        torch.library.opcheck(library.skinny_linear.default, operands(3, 9, 20, dtype))
    weights = [torch.randn(n, c) * 0.1 for n, c in ((24, 8), (8, 8), (10, 8), (8, 5))]
    step = (
        torch.randn(2, 8),
        torch.tensor([1, 0]),
        weights,
        [],
        torch.randn(8, 3, 8),
        torch.zeros(1, 2, 3, 2, 4, 4),
        torch.randn(2, 5, 1, 4),
        2,
        1e-5,
    )
    torch.library.opcheck(library.generator_step.default, step, rtol=1e-4, atol=1e-5)
