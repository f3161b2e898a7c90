"""Operators on the GPU against float64, by the checks of tests/ops and their rule about errors."""

from __future__ import annotations

import pytest
import test_cross_entropy
import test_entropy
import test_index_backprop
import test_search
import test_select
import torch
from conftest_of_ops import floors_of, make_operands

from ibq_fast import ops

SPREADS = pytest.mark.parametrize("spread", [0.02, 0.3, 4.0], ids=["uniform", "training", "peaked"])


def operands(device, size, subject, spread=1.0, bias=True, scale=0.5):
    return device.put(make_operands(*size, dtype=subject.dtype, spread=spread, bias=bias, scale=scale))


@pytest.mark.ops("codebook_search")
@pytest.mark.parametrize("bias", [False, True])
def test_searches(subject, bias, device, sizes, error_ratio) -> None:
    for size in [*sizes, (0, 7, 3)]:
        x = operands(device, size, subject, bias=bias)
        test_search.check(x, subject.backend, error_ratio, floors_of)


@pytest.mark.ops("codebook_search")
def test_ties_go_to_the_lowest_index(subject, device) -> None:
    """Small integers: every order of summation gives the same logit, so that equal codes tie exactly."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randint(-3, 4, (150, 40), generator=generator)
    codebook = torch.randint(-3, 4, (10, 40), generator=generator).repeat(130, 1)
    expected = (z.double() @ codebook.double().T).argmax(dim=1)
    z, codebook = (value.to(device.name, subject.dtype) for value in (z, codebook))
    found = ops.codebook_search(z, codebook, backend=subject.backend).indices
    assert torch.equal(found.cpu(), expected)
    zeros = ops.codebook_search(torch.zeros_like(z), codebook, backend=subject.backend).indices
    assert not zeros.any()


@pytest.mark.ops("straight_through_select")
@SPREADS
def test_selections(subject, spread, device, sizes, error_ratio) -> None:
    for size in sizes:
        x = operands(device, size, subject, spread)
        test_select.check(x, subject.backend, error_ratio, floors_of)


@pytest.mark.ops("softmax_statistics")
@SPREADS
def test_entropies(subject, spread, device, sizes, error_ratio) -> None:
    for size in sizes:
        for tau in (1.0, 0.01):
            x = operands(device, size, subject, spread, scale=1.0)
            test_entropy.check(x, tau, subject.backend, error_ratio, floors_of)


@pytest.mark.ops("linear_cross_entropy")
@SPREADS
def test_cross_entropies(subject, spread, device, sizes, error_ratio) -> None:
    for size in sizes:
        for smoothing in (0.0, 0.1):
            x = operands(device, size, subject, spread, scale=1.0)
            labels = test_cross_entropy.make_targets(*size[:2]).to(device.name)
            test_cross_entropy.check(x, labels, smoothing, subject.backend, error_ratio, floors_of)


@pytest.mark.ops("index_backprop")
@pytest.mark.parametrize("kind", test_index_backprop.REGIMES)
def test_index_backprops(subject, kind, device, error_ratio) -> None:
    sizes = [(45, 300, 19), (61, 8200, 48), (200, 8192, 64)] if device.cuda else [(45, 300, 19)]
    for n, k, d in sizes:
        z, codebook = (
            value.to(device.name, subject.dtype) for value in test_index_backprop.regime(kind, n, k, d)
        )
        w = torch.randn(n, d, generator=torch.Generator().manual_seed(1)).to(device.name, subject.dtype)
        _same_as_the_formula(subject, kind, z, codebook, w, error_ratio)


def _same_as_the_formula(subject, kind, z, codebook, w, error_ratio) -> None:
    module, tau = test_index_backprop, 0.1
    found = module.outputs_and_gradients(module.ours(subject.backend, tau), z, codebook, w)
    eager = module.outputs_and_gradients(module.formula(tau), z, codebook, w)
    truth = module.outputs_and_gradients(module.formula(tau), z.double(), codebook.double(), w.double())
    half = 0.0 if subject.dtype == torch.float32 else torch.finfo(subject.dtype).eps
    for name, value in truth.items():
        if half and name in ("z_q", "output to codebook"):
            continue  # the selected code: two may be closer than the rounding of the dtype
        floor = module.rounding_floor(name, z, codebook, tau, value, w=w) + half * value.abs().max().item()
        error_ratio(f"{kind}: {name}", found[name], eager[name], value, floor)


@pytest.mark.ops("code_histogram")
@pytest.mark.parametrize("codes", [1, 100, 12288, 12289, 262144])
def test_histogram(subject, codes, device) -> None:
    generator = torch.Generator().manual_seed(codes)
    spread = torch.randint(codes, (20_000,), generator=generator)
    collapsed = torch.full((20_000,), codes - 1)
    for indices in (spread, collapsed, spread[:0]):
        found = ops.code_histogram(indices.to(device.name), codes, backend=subject.backend)
        assert torch.equal(found.cpu(), indices.bincount(minlength=codes))
