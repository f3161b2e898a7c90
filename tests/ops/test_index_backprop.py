"""index_backprop: the two operators it joins, the norms it adds, and the tiles it may skip."""

from __future__ import annotations

import math

import pytest
import torch

from ibq_fast.ops import codebook_entropy, index_backprop, set_skip_tolerance, straight_through_select
from ibq_fast.ops.index_backprop import reference

REGIMES = ("uniform", "training", "peaked", "mixed", "equal", "duplicates")


def regime(kind: str, n: int, k: int, d: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Features and codes: logits flat, spread by 0.1, nearly one-hot, both, all equal, codes repeated."""
    generator = torch.Generator().manual_seed(seed)
    codebook = torch.randn(k, d, generator=generator)
    z = torch.randn(n, d, generator=generator)
    near = 3.0 * codebook[torch.randint(k, (n,), generator=generator)] + 0.1 * z
    if kind == "uniform":
        return z * 0.001, codebook / d**0.5
    if kind == "training":
        return z * 0.1, codebook / d**0.5
    if kind == "peaked":
        return near, codebook
    if kind == "mixed":
        return torch.where(torch.arange(n).unsqueeze(1) % 2 == 0, near, z * 0.001), codebook
    if kind == "equal":
        return torch.zeros(n, d), codebook
    return z, codebook[: max(k // 100, 1)].repeat(101, 1)[:k].contiguous()


def outputs_and_gradients(function, z, codebook, w):
    """z_q, both entropies and the gradients of each to z and codebook."""
    z, codebook = z.clone().requires_grad_(), codebook.clone().requires_grad_()
    z_q, sample, usage = function(z, codebook)
    terms = {"output": (z_q * w).sum(), "sample": sample, "usage": usage}
    found = {"z_q": z_q.detach(), "sample": sample.detach(), "usage": usage.detach()}
    for name, term in terms.items():
        grads = torch.autograd.grad(term, (z, codebook), retain_graph=True)
        found |= {f"{name} to z": grads[0], f"{name} to codebook": grads[1]}
    return found


def ours(backend, tau, scale=1.0, norm_weight=0.0):
    def run(z, codebook):
        out = index_backprop(
            z, codebook, temperature=tau, scale=scale, norm_weight=norm_weight, backend=backend
        )
        return out.z_q, out.sample_entropy, out.codebook_entropy

    return run


def formula(tau, scale=1.0, norm_weight=0.0):
    def run(z, codebook):
        z_q, _, _, _, _, rows, mean, *_ = reference(z, codebook, None, scale, norm_weight, tau)
        return z_q, rows.mean(), -(mean * torch.log(mean + 1e-5)).sum()

    return run


def rounding_floor(
    name: str, z, codebook, tau: float, truth, scale: float = 1.0, norm_weight: float = 0.0, w=None
) -> float:
    """float32 rounding of S/τ, as a relative error of p, carried through the terms of one gradient.

    A row's terms p_ij |log p_ij + H_i| add up to at most 2 log K; their sum may be far smaller than they are.
    """
    signed = z.double() @ codebook.double().T
    z, codebook = z.double().abs(), codebook.double().abs()
    s = (scale * (z @ codebook.T) + norm_weight * codebook.square().sum(dim=1)) / tau
    eps = torch.finfo(torch.float32).eps * (1 + s.max().item())
    if name == "output to z":  # K terms P_ij (|g_i·E_j| + |δ_i|) |E_j|, added up in float32
        p = signed.softmax(dim=1)
        terms = w.double().abs() @ codebook.T
        terms = p * (terms + (p * terms).sum(dim=1, keepdim=True))
        return torch.finfo(torch.float32).eps * (1 + tau * s.max().item()) * (terms @ codebook).max().item()
    if " to " not in name or name.startswith("output"):
        return eps * (truth.abs().max().item() + torch.finfo(torch.float32).eps)
    term = 2 * math.log(len(codebook) + 1) * scale / tau / len(z)
    if name.endswith("to z"):
        return eps * term * codebook.max().item()
    return eps * term * (s.softmax(dim=1).T @ z).max().item()


def check(kind, z, codebook, backend, error_ratio, tau=0.1) -> None:
    """Outputs and gradients by the error-ratio rule."""
    w = torch.randn(z.shape, generator=torch.Generator().manual_seed(1))
    found = outputs_and_gradients(ours(backend, tau), z, codebook, w)
    eager = outputs_and_gradients(formula(tau), z, codebook, w)
    truth = outputs_and_gradients(formula(tau), z.double(), codebook.double(), w.double())
    for name, value in truth.items():
        floor = rounding_floor(name, z, codebook, tau, value, w=w)
        error_ratio(f"{kind}: {name}", found[name], eager[name], value, floor)


@pytest.mark.parametrize("kind", REGIMES)
@pytest.mark.parametrize("size", [(45, 300, 19), (61, 8200, 48)], ids=["small", "bounded"])
def test_agrees_with_the_formula_in_every_regime(kind, size, backend, error_ratio) -> None:
    check(kind, *regime(kind, *size), backend, error_ratio)


@pytest.mark.parametrize("kind", REGIMES)
def test_agrees_with_the_formula_at_262144_codes(kind, error_ratio) -> None:
    check(kind, *regime(kind, 15, 262144, 8), "native", error_ratio)


@pytest.mark.parametrize("codes", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("features", [1e-3, 1.0, 1e3])
def test_agrees_with_the_formula_at_every_magnitude(features, codes, backend, error_ratio) -> None:
    z, codebook = regime("mixed", 25, 8200, 24)
    check(f"{features} {codes}", features * z, codes * codebook, backend, error_ratio)


@pytest.fixture
def skip_nothing():
    set_skip_tolerance(0)
    yield
    set_skip_tolerance(None)


@pytest.mark.parametrize("kind", REGIMES)
def test_agrees_with_the_formula_when_nothing_is_skipped(kind, skip_nothing, error_ratio) -> None:
    check(kind, *regime(kind, 31, 8200, 24), "native", error_ratio)


@pytest.mark.parametrize("kind", REGIMES)
def test_skipping_changes_nothing_that_float32_can_hold(kind) -> None:
    z, codebook = regime(kind, 40, 9000, 24)
    w = torch.randn(z.shape, generator=torch.Generator().manual_seed(1))
    skipping = outputs_and_gradients(ours("native", 0.1), z, codebook, w)
    set_skip_tolerance(0)
    try:
        dense = outputs_and_gradients(ours("native", 0.1), z, codebook, w)
    finally:
        set_skip_tolerance(None)
    for name, value in dense.items():
        bound = 4e-6 * value.abs().max().item()  # sums of up to 9,000 terms in another order
        torch.testing.assert_close(skipping[name], value, rtol=0, atol=bound)


def test_a_looser_tolerance_drops_no_more_than_it_says() -> None:
    z, codebook = regime("peaked", 40, 9000, 24)
    z = 0.7 * z
    w = torch.randn(z.shape, generator=torch.Generator().manual_seed(1))
    exact = outputs_and_gradients(ours("native", 0.1), z, codebook, w)
    set_skip_tolerance(1e-2)
    try:
        loose = outputs_and_gradients(ours("native", 0.1), z, codebook, w)
    finally:
        set_skip_tolerance(None)
    difference = (loose["output to z"] - exact["output to z"]).abs().amax(dim=1)
    # each dropped entry of P would have brought P_ij (g·E_j - δ) E_j
    bound = 1e-2 * 2 * (w @ codebook.T).abs().amax(dim=1) * codebook.abs().max()
    assert (difference <= bound).all()
    assert difference.max() > 0


def test_is_the_sum_of_the_operators_it_joins(backend, operands) -> None:
    x = operands(50, 200, 24, bias=True)
    joined, apart = (
        [leaf.requires_grad_() for leaf in x.leaves()],
        [leaf.requires_grad_() for leaf in x.leaves()],
    )
    out = index_backprop(joined[0], joined[1], bias=joined[2], scale=0.5, temperature=0.2, backend=backend)
    chosen = straight_through_select(apart[0], apart[1], bias=apart[2], scale=0.5, backend=backend)
    entropies = codebook_entropy(
        apart[0], apart[1], bias=apart[2], scale=0.5, temperature=0.2, backend=backend
    )
    assert torch.equal(out.indices, chosen.indices)
    torch.testing.assert_close(out.sample_entropy, entropies.sample_entropy)
    torch.testing.assert_close(out.mean_prob, entropies.mean_prob)

    def total(z_q, codes, sample, usage):
        return (z_q * x.grad_z_q).sum() + (codes * x.grad_codes).sum() + 3 * sample - 2 * usage

    first = torch.autograd.grad(total(out.z_q, out.codes, out.sample_entropy, out.codebook_entropy), joined)
    second = torch.autograd.grad(
        total(chosen.z_q, chosen.codes, entropies.sample_entropy, entropies.codebook_entropy), apart
    )
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("k", [90, 8192])
def test_norms_make_the_nearest_code_win(k, backend, error_ratio) -> None:
    z, codebook = regime("uniform", 33, k, 16, seed=3)
    z, codebook = 100 * z, 4 * codebook
    w = torch.randn(33, 16, generator=torch.Generator().manual_seed(1))
    out = index_backprop(z, codebook, temperature=0.5, scale=2.0, norm_weight=1.0, backend=backend)
    assert torch.equal(out.indices, torch.cdist(z.double(), codebook.double()).argmin(dim=1))
    found = outputs_and_gradients(ours(backend, 0.5, 2.0, 1.0), z, codebook, w)
    eager = outputs_and_gradients(formula(0.5, 2.0, 1.0), z, codebook, w)
    truth = outputs_and_gradients(formula(0.5, 2.0, 1.0), z.double(), codebook.double(), w.double())
    for name, value in truth.items():
        error_ratio(
            name, found[name], eager[name], value, rounding_floor(name, z, codebook, 0.5, value, 2.0, 1.0, w)
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, backend, error_ratio) -> None:
    z, codebook = (x.to(dtype) for x in regime("training", 70, 8300, 64))
    w = torch.randn(70, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = outputs_and_gradients(ours(backend, 0.1), z, codebook, w)
    eager = outputs_and_gradients(formula(0.1), z, codebook, w)
    truth = outputs_and_gradients(formula(0.1), z.double(), codebook.double(), w.double())
    same = (found["z_q"].double() == truth["z_q"]).all(dim=1)
    assert same.float().mean() > 0.9  # the rest: two codes closer than the rounding of the dtype
    for name in truth.keys() - {"z_q", "output to codebook"}:
        floor = torch.finfo(dtype).eps * truth[name].abs().max().item()
        error_ratio(name, found[name], eager[name], truth[name], floor)


def test_empty_batch(backend) -> None:
    z, codebook = torch.zeros(0, 4, requires_grad=True), torch.randn(6, 4, requires_grad=True)
    out = index_backprop(z, codebook, temperature=0.1, backend=backend)
    (out.z_q.sum() + out.sample_entropy + out.codebook_entropy).backward()
    assert out.indices.shape == (0,)
    assert not codebook.grad.any()


def test_compiles_whole(backend) -> None:
    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(z, codebook):
        out = index_backprop(z, codebook, temperature=0.1, backend=backend)
        return out.z_q.square().sum() + out.sample_entropy - out.codebook_entropy

    z, codebook = torch.randn(20, 8, requires_grad=True), torch.randn(30, 8, requires_grad=True)
    step(z, codebook).backward()
    assert codebook.grad.abs().sum() > 0
