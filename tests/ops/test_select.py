"""straight_through_select: values of a gather, gradients of index backpropagation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ibq_fast.ops import backends, codebook_search, search, select, straight_through_select

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def gradients(x, outputs, leaves):
    z_q, codes = outputs
    total = (z_q * x.grad_z_q).sum() + (codes * x.grad_codes).sum()
    return torch.autograd.grad(total, [leaf for leaf in leaves if leaf is not None])


def by_formula(x):
    leaves = x.leaves()
    z_q, codes, *_ = select.reference(*leaves, x.scale)
    return gradients(x, (z_q, codes), leaves)


def check(x, backend, error_ratio, floors) -> None:
    leaves = x.leaves()
    ours = straight_through_select(leaves[0], leaves[1], bias=leaves[2], scale=x.scale, backend=backend)
    found = codebook_search(x.z, x.codebook, scale=x.scale, bias=x.bias, backend=backend)
    assert torch.equal(ours.indices, found.indices)
    assert torch.equal(ours.z_q, x.codebook[ours.indices])
    assert torch.equal(ours.codes, x.codebook[ours.indices])
    wide = x.to(torch.float64)
    s = search.logits(wide.z, wide.codebook, wide.bias, x.scale)
    if not torch.equal(ours.indices, s.argmax(dim=1)):
        return  # two codes closer than rounding: the gather's gradient goes to either
    p, g = s.softmax(dim=1), wide.grad_z_q.abs() @ wide.codebook.abs().T
    limits = floors.gradients(x, p * (g + (p * g).sum(dim=1, keepdim=True)))
    half = torch.finfo(x.codebook.dtype).eps
    gathered = torch.zeros_like(wide.codebook).index_add_(
        0, ours.indices, wide.grad_z_q.abs() + wide.grad_codes.abs()
    )
    limits = (limits[0], limits[1] + half * gathered.abs().max().item(), limits[2]) if x.z.numel() else limits
    names = ("z", "codebook", "bias")
    for name, a, b, c, floor in zip(
        names, gradients(x, ours[:2], leaves), by_formula(x), by_formula(wide), limits, strict=False
    ):
        assert a.dtype == (x.codebook.dtype if name != "bias" else x.bias.dtype)
        error_ratio(f"gradient of {name}", a, b, c, floor)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spread", [0.02, 1.0, 4.0], ids=["uniform", "mixed", "peaked"])
@pytest.mark.parametrize("size", [(1, 1, 1), (97, 515, 59), (33, 2, 111), (40, 130, 64)])
def test_agrees_with_the_formula(size, spread, dtype, backend, operands, error_ratio, floors) -> None:
    check(operands(*size, dtype=dtype, spread=spread, bias=True, scale=0.5), backend, error_ratio, floors)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n=st.integers(0, 40),
    k=st.integers(1, 90),
    d=st.integers(1, 40),
    scale=st.sampled_from([1.0, -2.5, 0.01, 8.0]),
    bias=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_any_size(
    n, k, d, scale, bias, dtype, seed, backend, operands, small_blocks, error_ratio, floors
) -> None:
    x = operands(n, k, d, dtype=dtype, scale=scale, bias=bias, seed=seed)
    check(x, backend, error_ratio, floors)


def test_codes_carry_the_gather_gradient_only(backend, operands) -> None:
    x = operands(30, 12, 8)
    z, codebook, _ = x.leaves()
    ours = straight_through_select(z, codebook, backend=backend)
    grad_z, grad_codebook = torch.autograd.grad((ours.codes * x.grad_codes).sum(), (z, codebook))
    assert bool((grad_z == 0).all())
    expected = torch.zeros_like(x.codebook).index_add_(0, ours.indices, x.grad_codes)
    torch.testing.assert_close(grad_codebook, expected)


def test_a_certain_row_has_an_exact_gradient(backend, operands, error_ratio) -> None:
    """P is one-hot to float32: what the winner loses is what the others gain, nothing here.

    Taken as P (g·E - δ), the winner's entry of dS was the rounding of two equal sums, times the scale.
    """
    x = operands(16, 64, 32, scale=50.0)
    leaves = x.leaves()
    ours = straight_through_select(leaves[0], leaves[1], scale=x.scale, backend=backend)
    grads = gradients(x, ours[:2], leaves)
    for name, a, b, c in zip(
        ("z", "codebook"), grads, by_formula(x), by_formula(x.to(torch.float64)), strict=True
    ):
        error_ratio(f"gradient of {name}", a, b, c)


def test_strided_operands_and_gradients(backend, operands) -> None:
    x = operands(24, 40, 12)
    z, codebook, _ = x.leaves()
    plain = straight_through_select(z, codebook, backend=backend)
    expected = torch.autograd.grad(plain.z_q.sum(), (z, codebook))
    zt, et = x.z.T.contiguous().requires_grad_(), x.codebook.T.contiguous().requires_grad_()
    strided = straight_through_select(zt.T, et.T, backend=backend)
    actual = torch.autograd.grad(strided.z_q.sum(), (zt, et))
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.T, b, rtol=1e-4, atol=1e-5)


def test_without_gradients_only_the_search_runs(backend, operands, monkeypatch) -> None:
    x = operands(5, 9, 4)
    asked = []
    monkeypatch.setattr(select.backends, "select", lambda op, *rest: asked.append(op) or _SELECT(op, *rest))
    z, codebook, _ = x.leaves()
    straight_through_select(x.z, x.codebook, backend=backend)
    with torch.no_grad():
        result = straight_through_select(z, codebook, backend=backend)
    straight_through_select(z, codebook, backend=backend)
    assert asked == ["codebook_search", "codebook_search", "straight_through_select"]
    assert torch.equal(result.z_q, x.codebook[result.indices])
    assert result.z_q.data_ptr() != result.codes.data_ptr()


_SELECT = backends.select


def test_empty_batch(backend, operands) -> None:
    x = operands(0, 7, 3, bias=True)
    z, codebook, bias = x.leaves()
    ours = straight_through_select(z, codebook, bias=bias, backend=backend)
    grads = torch.autograd.grad(ours.z_q.sum(), (z, codebook, bias))
    assert ours.z_q.shape == (0, 3)
    assert all(bool((g == 0).all()) for g in grads)
    assert [g.shape for g in grads] == [(0, 3), (7, 3), (7,)]


def test_second_derivatives_are_refused(backend, operands) -> None:
    x = operands(4, 7, 3)
    z, codebook, _ = x.leaves()
    ours = straight_through_select(z, codebook, backend=backend)
    (grad,) = torch.autograd.grad((ours.z_q * x.grad_z_q).sum(), z, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        grad.sum().backward()
