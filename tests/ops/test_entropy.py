"""codebook_entropy and its operator: entropies of softmax(S/τ) and of its mean."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ibq_fast.ops import backends, codebook_entropy, entropy, search

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def results(x, tau, operator):
    """(row entropy, mean probability, gradients...) of ``operator``."""
    leaves = x.leaves()
    row_entropy, mean_prob, _ = operator(*leaves, x.scale, tau)
    total = (row_entropy * x.grad_rows).sum() + (mean_prob * x.grad_mean).sum()
    grads = torch.autograd.grad(total, [leaf for leaf in leaves if leaf is not None])
    return row_entropy.detach(), mean_prob.detach(), *grads


def check(x, tau, backend, error_ratio, floors) -> None:
    namespace = getattr(torch.ops, backends.NAMESPACES[backend])
    ours = results(x, tau, namespace.softmax_statistics)
    eager = results(x, tau, entropy.reference)
    wide = x.to(torch.float64)
    truth = results(wide, tau, entropy.reference)
    n = x.z.shape[0]
    s = search.logits(wide.z, wide.codebook, wide.bias, x.scale) / tau
    log_p = s.log_softmax(dim=1)
    p, h = log_p.exp(), truth[0].unsqueeze(1)
    relative = torch.finfo(torch.float32).eps * (1 + x.magnitude / tau)
    row_floor = (relative * p * (1 + log_p.abs() + h)).sum(dim=1).max().item() if n else 0.0
    mean_floor = (relative * p).mean(dim=0).max().item() if n else 0.0
    c = wide.grad_mean.abs() / max(n, 1)
    magnitude = (p / tau) * (
        wide.grad_rows.abs().unsqueeze(1) * (log_p.abs() + h + 1) + c + (p * c).sum(dim=1, keepdim=True)
    )
    limits = (row_floor, mean_floor, *floors.gradients(x, magnitude, tau))
    names = ("row entropy", "mean probability", "gradient of z", "gradient of codebook", "gradient of bias")
    for name, a, b, t, floor in zip(names, ours, eager, truth, limits, strict=False):
        error_ratio(name, a, b, t, floor)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tau", [1.0, 0.05, 0.01])
@pytest.mark.parametrize("spread", [0.02, 0.3, 2.0], ids=["uniform", "training", "peaked"])
@pytest.mark.parametrize("size", [(1, 1, 1), (97, 515, 59), (33, 2, 111)])
def test_agrees_with_the_formula(size, spread, tau, dtype, backend, operands, error_ratio, floors) -> None:
    check(operands(*size, dtype=dtype, spread=spread, bias=True), tau, backend, error_ratio, floors)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n=st.integers(1, 40),
    k=st.integers(1, 90),
    d=st.integers(1, 40),
    scale=st.sampled_from([1.0, -2.5, 0.01]),
    tau=st.sampled_from([0.01, 0.3, 5.0]),
    bias=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_any_size(
    n, k, d, scale, tau, bias, dtype, seed, backend, operands, small_blocks, error_ratio, floors
) -> None:
    x = operands(n, k, d, dtype=dtype, scale=scale, bias=bias, seed=seed)
    check(x, tau, backend, error_ratio, floors)


def test_the_two_entropies(backend, operands) -> None:
    x = operands(31, 45, 8)
    p = (x.z.double() @ x.codebook.double().T / 0.3).softmax(dim=1)
    mean = p.mean(dim=0)
    result = codebook_entropy(x.z, x.codebook, temperature=0.3, eps=1e-5, backend=backend)
    sample = -(p * p.log()).sum(dim=1).mean()
    assert result.sample_entropy.item() == pytest.approx(sample.item(), rel=1e-5)
    usage = -(mean * (mean + 1e-5).log()).sum()
    assert result.codebook_entropy.item() == pytest.approx(usage.item(), rel=1e-5)
    torch.testing.assert_close(result.mean_prob, mean.float(), rtol=1e-4, atol=1e-7)


def test_limits(backend) -> None:
    """Equal logits: log K; one logit far above: 0, with zero gradients."""
    z, codebook = torch.zeros(5, 4), torch.randn(64, 4)
    flat = codebook_entropy(z, codebook, temperature=0.01, backend=backend)
    assert flat.sample_entropy.item() == pytest.approx(math.log(64), rel=1e-6)
    z = torch.eye(4).mul(100).requires_grad_()
    codebook = torch.eye(4).mul(100).requires_grad_()
    sure = codebook_entropy(z, codebook, temperature=0.01, backend=backend)
    assert sure.sample_entropy.item() == 0
    assert sure.codebook_entropy.item() == pytest.approx(math.log(4), rel=1e-4)
    for term in sure[:2]:
        for grad in torch.autograd.grad(term, (z, codebook), retain_graph=True):
            assert bool((grad == 0).all())


def test_half_precision_does_not_overflow(backend) -> None:
    z, codebook = torch.full((3, 64), 8.0, dtype=torch.float16), torch.randn(32, 64).half()
    result = codebook_entropy(z, codebook, temperature=0.01, backend=backend)
    assert all(bool(t.isfinite().all()) for t in result)


def test_a_masked_code_changes_nothing(backend, operands) -> None:
    x = operands(12, 30, 8, bias=True)
    x.bias[20:] = float("-inf")
    z, codebook, bias = x.leaves()
    ours = codebook_entropy(z, codebook, bias=bias, temperature=0.5, backend=backend)
    truth = codebook_entropy(x.z, x.codebook[:20], bias=x.bias[:20], temperature=0.5, backend=backend)
    torch.testing.assert_close(ours.sample_entropy.detach(), truth.sample_entropy)
    grads = torch.autograd.grad(ours.sample_entropy, (z, codebook))
    assert all(bool(g.isfinite().all()) for g in grads)


def test_empty_batch(backend, operands) -> None:
    x = operands(0, 7, 3)
    z, codebook, _ = x.leaves()
    result = codebook_entropy(z, codebook, temperature=0.1, backend=backend)
    assert result.sample_entropy.item() == result.codebook_entropy.item() == 0
    assert bool((result.mean_prob == 0).all())
    grads = torch.autograd.grad(result.sample_entropy - result.codebook_entropy, (z, codebook))
    assert bool((grads[1] == 0).all())
