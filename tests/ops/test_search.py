"""codebook_search: the best code, ties to the lowest index, log-sum-exp."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ibq_fast.ops import backends, codebook_search, search, straight_through_select

SIZES = [(1, 1, 1), (97, 1025, 59), (5, 16, 111), (33, 3, 256), (8, 24, 8), (130, 257, 64)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def check(x, backend, error_ratio, floors) -> None:
    ours = codebook_search(x.z, x.codebook, scale=x.scale, bias=x.bias, with_lse=True, backend=backend)
    eager = search.reference(x.z, x.codebook, x.bias, x.scale)
    wide = x.to(torch.float64)
    truth = search.reference(wide.z, wide.codebook, wide.bias, x.scale)
    floor = floors.logits(x)
    error_ratio("max", ours.max, eager[1], truth[1], floor)
    error_ratio("lse", ours.lse, eager[2], truth[2], floor)
    alone = codebook_search(x.z, x.codebook, scale=x.scale, bias=x.bias, backend=backend)
    assert torch.equal(alone.indices, ours.indices)
    assert torch.equal(alone.max, ours.max)
    assert ours.indices.dtype == torch.int64
    assert ours.max.dtype == ours.lse.dtype == search.statistics_dtype(x.z.dtype)
    logits = search.logits(wide.z, wide.codebook, wide.bias, x.scale)
    chosen = logits.gather(1, ours.indices.unsqueeze(1)).squeeze(1)
    best, second = (logits.topk(min(2, logits.shape[1]), dim=1).values[:, i] for i in (0, -1))
    clear = best - second > 2 * floor
    assert torch.equal(ours.indices[clear], truth[0][clear])
    assert bool((best - chosen <= 2 * floor).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_agrees_with_the_formula(size, bias, dtype, backend, operands, error_ratio, floors) -> None:
    check(operands(*size, dtype=dtype, bias=bias, scale=0.7), backend, error_ratio, floors)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n=st.integers(0, 40),
    k=st.integers(1, 90),
    d=st.integers(1, 70),
    scale=st.sampled_from([1.0, -2.5, 0.01, 30.0]),
    bias=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_any_size(
    n, k, d, scale, bias, dtype, seed, backend, operands, small_blocks, error_ratio, floors
) -> None:
    x = operands(n, k, d, dtype=dtype, scale=scale, bias=bias, seed=seed)
    check(x, backend, error_ratio, floors)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_go_to_the_lowest_index(dtype, backend, small_blocks) -> None:
    """Small integers: every order of summation gives the same logit, so that equal codes tie exactly."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randint(-3, 4, (20, 16), generator=generator).to(dtype)
    codebook = torch.randint(-3, 4, (10, 16), generator=generator).to(dtype).repeat(13, 1)
    expected = (z.double() @ codebook.double().T).argmax(dim=1)
    assert int(expected.max()) < 10
    assert torch.equal(codebook_search(z, codebook, backend=backend).indices, expected)
    assert torch.equal(straight_through_select(z, codebook, backend=backend).indices, expected)
    assert codebook_search(torch.zeros_like(z), codebook, backend=backend).indices.tolist() == [0] * 20


def test_strides_do_not_matter(backend, operands) -> None:
    x = operands(24, 40, 12, bias=True)
    plain = codebook_search(x.z, x.codebook, bias=x.bias, with_lse=True, backend=backend)
    wide = torch.stack([x.bias, x.bias], dim=1)[:, 0]
    strided = codebook_search(
        x.z.T.contiguous().T, x.codebook.T.contiguous().T, bias=wide, with_lse=True, backend=backend
    )
    assert torch.equal(plain.indices, strided.indices)
    torch.testing.assert_close(plain.lse, strided.lse)


def test_empty_batch(backend, operands) -> None:
    x = operands(0, 7, 3)
    result = codebook_search(x.z, x.codebook, with_lse=True, backend=backend)
    assert [t.shape for t in result] == [(0,)] * 3


def test_lse_only_when_asked_for(backend, operands) -> None:
    x = operands(4, 7, 3)
    assert codebook_search(x.z, x.codebook, backend=backend).lse is None


def test_a_masked_code_is_never_chosen(backend, operands, small_blocks) -> None:
    x = operands(30, 60, 8, bias=True)
    x.bias[:40] = float("-inf")
    ours = codebook_search(x.z, x.codebook, bias=x.bias, with_lse=True, backend=backend)
    truth = codebook_search(x.z, x.codebook[40:], bias=x.bias[40:], with_lse=True, backend=backend)
    assert torch.equal(ours.indices, truth.indices + 40)
    torch.testing.assert_close(ours.lse, truth.lse)


def test_a_nan_row_gives_index_zero(backend, operands, small_blocks) -> None:
    x = operands(4, 60, 8)
    x.z[2, 3] = float("nan")
    namespace = getattr(torch.ops, backends.NAMESPACES[backend])
    indices, best, lse = namespace.codebook_search(x.z, x.codebook, None, 1.0, True, False)
    assert indices[2] == 0
    assert bool(best[2].isnan())
    assert bool(lse[2].isnan())
    assert not bool(lse[[0, 1, 3]].isnan().any())


@pytest.mark.parametrize("kind", ["random", "clustered", "near ties", "duplicates"])
@pytest.mark.parametrize("size", [(600, 4096, 64), (130, 2100, 256), (1000, 2500, 33)])
def test_exact_search_is_the_float32_search(size, kind, backend) -> None:
    n, k, d = size
    generator = torch.Generator().manual_seed(k)
    codebook, z = torch.randn(k, d, generator=generator), torch.randn(n, d, generator=generator)
    if kind != "random":
        codebook = codebook[: 7 if kind == "duplicates" else 200].repeat(k, 1)[:k].contiguous()
    if kind == "clustered":
        codebook += 0.001 * torch.randn(k, d, generator=generator)
    if kind == "near ties":
        moved = torch.rand(k, d, generator=generator) < 0.05
        codebook = torch.where(moved, torch.nextafter(codebook, codebook + 1), codebook)
    bias = torch.randn(k, generator=generator) if kind == "clustered" else None
    plain = codebook_search(z, codebook, scale=1.7, bias=bias, backend=backend)
    exact = codebook_search(z, codebook, scale=1.7, bias=bias, exact=True, backend=backend)
    assert torch.equal(plain.indices, exact.indices)
    assert torch.equal(plain.max, exact.max)


def _odd_operands(kind: str, z: torch.Tensor, codebook: torch.Tensor) -> dict[str, object]:
    """Spoils the operands in place; what else the call is to be given."""
    if kind == "tiny codes":  # what rounding loses of them underflows when squared
        codebook *= 1e-20
    elif kind == "huge rows":
        z[::3] *= 1e30
        codebook *= 1e9
    elif kind == "infinite code":
        codebook[1234, 5] = float("inf")
    elif kind == "NaN code":
        codebook[77, 3] = float("nan")
    elif kind == "NaN row":
        z[5, 2] = float("nan")
    elif kind == "masked":
        bias = torch.randn(len(codebook))
        bias[torch.rand(len(codebook)) < 0.7] = float("-inf")
        bias[torch.rand(len(codebook)) < 0.1] = -1e30
        return {"bias": bias}
    elif kind == "negative scale":
        return {"scale": -0.3}
    elif kind == "no scale":
        return {"scale": 0.0, "bias": torch.arange(len(codebook), dtype=torch.float32)}
    return {}


@pytest.mark.parametrize(
    "kind",
    [
        "tiny codes",
        "huge rows",
        "infinite code",
        "NaN code",
        "NaN row",
        "masked",
        "negative scale",
        "no scale",
    ],
)
def test_exact_search_of_odd_numbers_is_the_float32_search(kind) -> None:
    generator = torch.Generator().manual_seed(11)
    codebook, z = torch.randn(2500, 65, generator=generator), torch.randn(600, 65, generator=generator)
    keywords = {"bias": None, "scale": 1.0} | _odd_operands(kind, z, codebook)

    def search(exact: bool):
        # The op itself: the function in front of it refuses NaN.
        return torch.ops.ibq_fast.codebook_search(
            z, codebook, keywords["bias"], keywords["scale"], False, exact
        )

    for plain, ours in zip(search(False)[:2], search(True)[:2], strict=True):
        torch.testing.assert_close(ours, plain, rtol=0, atol=0, equal_nan=True)
