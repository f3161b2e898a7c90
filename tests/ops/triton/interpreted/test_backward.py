"""Backward operators: gradients against float64 in flat, mixed and peaked rows; winners; no rows."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ibq_fast.ops import cross_entropy, entropy, search, select
from ibq_fast.ops.index_backprop import reference as joint_reference
from ibq_fast.ops.triton import live, plan

NAMES = ("gradient of z", "gradient of codebook", "gradient of bias")
IGNORED = -7


def gradients(x, operator, total):
    """Gradients of total(outputs) to (z, codebook, bias)."""
    leaves = x.leaves()
    value = total(operator(*leaves), x)
    return torch.autograd.grad(value, [leaf for leaf in leaves if leaf is not None])


def check(x, ours, formula, total, limits, error_ratio) -> None:
    found = gradients(x, ours, total)
    eager = gradients(x, formula, total)
    truth = gradients(x.to(torch.float64), formula, total)
    for name, a, b, t, floor in zip(NAMES, found, eager, truth, limits, strict=False):
        error_ratio(name, a, b, t, floor)


def select_total(out, x):
    return (out[0] * x.grad_z_q).sum() + (out[1] * x.grad_codes).sum()


def entropy_total(out, x):
    return (out[0] * x.grad_rows).sum() + (out[1] * x.grad_mean).sum()


def joint_total(out, x):
    return select_total(out, x) + entropy_total(out[5:7], x)


def select_magnitude(x):
    wide = x.to(torch.float64)
    p = search.logits(wide.z, wide.codebook, wide.bias, x.scale).softmax(dim=1)
    g = wide.grad_z_q.abs() @ wide.codebook.abs().T
    return p * (g + (p * g).sum(dim=1, keepdim=True))


def entropy_magnitude(x, tau):
    wide = x.to(torch.float64)
    log_p = (search.logits(wide.z, wide.codebook, wide.bias, x.scale) / tau).log_softmax(dim=1)
    p = log_p.exp()
    h = -(p * log_p).sum(dim=1, keepdim=True)
    c = wide.grad_mean.abs() / len(p)
    rows = wide.grad_rows.abs().unsqueeze(1) * (log_p.abs() + h + 1)
    return (p / tau) * (rows + c + (p * c).sum(dim=1, keepdim=True))


def with_gathered(x, limits):
    """The gather's gradient is rounded to the codebook's dtype besides."""
    index = search.reference(x.z.double(), x.codebook.double(), x.bias, x.scale)[0]
    total = x.grad_z_q.double().abs() + x.grad_codes.double().abs()
    gathered = torch.zeros_like(x.codebook, dtype=torch.float64).index_add_(0, index, total)
    return limits[0], limits[1] + torch.finfo(x.codebook.dtype).eps * gathered.max().item(), limits[2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("spread", [0.02, 1.0, 4.0], ids=["flat", "mixed", "peaked"])
def test_select(spread, dtype, ops, operands, floors, error_ratio) -> None:
    x = operands(37, 75, 33, dtype=dtype, spread=spread, bias=True, scale=0.5)
    limits = with_gathered(x, floors.gradients(x, select_magnitude(x)))
    check(
        x,
        lambda *o: ops.straight_through_select(*o, 0.5),
        lambda *o: select.reference(*o, 0.5),
        select_total,
        limits,
        error_ratio,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("tau", [1.0, 0.05])
@pytest.mark.parametrize("spread", [0.02, 2.0], ids=["flat", "peaked"])
def test_entropies(spread, tau, dtype, ops, operands, floors, error_ratio) -> None:
    x = operands(37, 75, 33, dtype=dtype, spread=spread, bias=True)
    check(
        x,
        lambda *o: ops.softmax_statistics(*o, 1.0, tau),
        lambda *o: entropy.reference(*o, 1.0, tau),
        entropy_total,
        floors.gradients(x, entropy_magnitude(x, tau), tau),
        error_ratio,
    )


@pytest.mark.parametrize("d", [1, 8, 64, 256])
def test_joint(d, ops, operands, floors, error_ratio) -> None:
    x = operands(21, 75, d, bias=True, spread=d**-0.5)
    tau = 0.1
    magnitude = select_magnitude(x) + entropy_magnitude(x, tau)
    limits = with_gathered(x, floors.gradients(x, magnitude, tau))
    check(
        x,
        lambda *o: ops.index_backprop(*o, 1.0, 0.0, tau),
        lambda *o: joint_reference(*o, 1.0, 0.0, tau),
        joint_total,
        limits,
        error_ratio,
    )


def test_joint_with_256_dimensions_held_whole(held_whole, ops, operands, floors, error_ratio) -> None:
    test_joint(256, ops, operands, floors, error_ratio)


def test_norms(ops, operands, floors, error_ratio) -> None:
    x = operands(21, 75, 16, bias=True)
    tau = 0.5
    magnitude = 3 * (select_magnitude(x) + entropy_magnitude(x, tau))
    limits = with_gathered(x, floors.gradients(x, magnitude, tau))
    check(
        x,
        lambda *o: ops.index_backprop(*o, 1.0, 0.2, tau),
        lambda *o: joint_reference(*o, 1.0, 0.2, tau),
        joint_total,
        limits,
        error_ratio,
    )


@pytest.mark.parametrize("peaked", [False, True], ids=["all tiles live", "few tiles live"])
def test_joint_walks_live_tiles_alone(peaked, ops, operands, floors, error_ratio, monkeypatch) -> None:
    """Peaked: the rows of a tile have all their mass on the same few codes."""
    monkeypatch.setattr(live, "BOUNDED_FROM", 1)
    x = operands(37, 330, 16, spread=0.3, bias=True)
    if peaked:
        x.codebook[100:] *= 0.1
        x.z.copy_(60 * x.codebook[[3] * 16 + [90] * 21] + 0.1 * x.z)
    walked = []
    walks = live.Live.walks

    def spied(self, tile, over_codes):
        walk = walks(self, tile, over_codes)
        walked.append(walk[:, 0].sum().item() / walk[:, 1:].numel())
        return walk

    monkeypatch.setattr(live.Live, "walks", spied)
    tau = 0.5
    magnitude = 3 * (select_magnitude(x) + entropy_magnitude(x, tau))
    limits = with_gathered(x, floors.gradients(x, magnitude, tau))
    check(
        x,
        lambda *o: ops.index_backprop(*o, 1.0, 0.2, tau),
        lambda *o: joint_reference(*o, 1.0, 0.2, tau),
        joint_total,
        limits,
        error_ratio,
    )
    assert len(walked) == 3  # moments, rows, codes
    assert all(0.0 < share < 0.6 if peaked else share == 1.0 for share in walked), walked


def test_live_tiles_are_listed_for_tiles_of_any_size(monkeypatch) -> None:
    """Bounds of 16 × 32 tiles for kernels with larger and smaller ones, by a loop over all pairs."""
    monkeypatch.setattr(live, "BOUNDED_FROM", 1)
    n, k = 75, 300
    z = torch.zeros(n, 16)
    bound = torch.full((2, *live.grid(z, k)), -1e3)
    marks = [(0, 0, 0), (1, 2, 3), (0, 4, 9), (1, 4, 8)]
    for mark in marks:
        bound[mark] = -1.0
    bound[0, 3, 5] = float("nan")
    lives = live.Live(bound, z, k)
    pairs = [(r, c) for _, r, c in marks] + [(3, 5)]
    for rows, codes in ((16, 32), (32, 16), (64, 128), (16, 64)):
        tile = plan.Tile(rows=rows, codes=codes, depth=16, out=16, warps=1, stages=1)
        hit = torch.zeros(-(-n // rows), -(-k // codes), dtype=torch.bool)
        for r, c in pairs:
            for i in range(r * 16, min(r * 16 + 16, n)):
                for j in range(c * 32, min(c * 32 + 32, k)):
                    hit[i // rows, j // codes] = True
        for over_codes, expected in ((True, hit), (False, hit.T)):
            walk = lives.walks(tile, over_codes)
            found = [sorted(line[1 : 1 + line[0]]) for line in walk.tolist()]
            assert found == [line.nonzero().flatten().tolist() for line in expected]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_flat_row_beside_a_certain_one(dtype, ops, operands, error_ratio) -> None:
    """Flat rows keep their small entries of dS beside rows whose entries are nearly 1, in float16 too."""
    x = operands(16, 70, 32, dtype=dtype)
    x.z[::2] = (3 * x.codebook[:8].float()).to(dtype)
    x.z[1::2] *= 1e-3
    x.grad_z_q[1::2] *= 1e-3

    def to_z(inputs, operator):
        z, codebook, _ = inputs.leaves()
        (grad,) = torch.autograd.grad((operator(z, codebook, None, 1.0)[0] * inputs.grad_z_q).sum(), z)
        return grad[1::2]

    truth = to_z(x.to(torch.float64), select.reference)
    floor = 4 * torch.finfo(dtype).eps * truth.abs().max().item()
    error_ratio("flat rows", to_z(x, ops.straight_through_select), to_z(x, select.reference), truth, floor)


def test_a_certain_row_has_an_exact_gradient(ops, operands, error_ratio) -> None:
    """What the winner loses is what the others gain, nothing here; its own entry would be rounding."""
    x = operands(16, 64, 32, scale=50.0)
    found = gradients(x, lambda *o: ops.straight_through_select(*o, 50.0), select_total)
    eager = gradients(x, lambda *o: select.reference(*o, 50.0), select_total)
    truth = gradients(x.to(torch.float64), lambda *o: select.reference(*o, 50.0), select_total)
    for name, a, b, t in zip(NAMES, found, eager, truth, strict=False):
        error_ratio(name, a, b, t)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(("d", "spread"), [(33, 1.0), (256, 0.01), (256, 1.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_cross_entropy(dtype, d, spread, smoothing, ops, operands, floors, error_ratio) -> None:
    x = operands(21, 75, d, bias=True, spread=spread, dtype=dtype)
    targets = torch.arange(21) * 3
    targets[::5] = IGNORED
    wide = x.to(torch.float64)
    p = (wide.z @ wide.codebook.T + wide.bias).softmax(dim=1)
    q = F.one_hot(targets.clamp_min(0), 75) * (1 - smoothing) + smoothing / 75
    magnitude = wide.grad_rows.abs().unsqueeze(1) * (p + q) * (targets != IGNORED).unsqueeze(1)
    check(
        x,
        lambda *o: ops.linear_cross_entropy(*o, targets, IGNORED, smoothing),
        lambda *o: cross_entropy.reference(*o, targets, IGNORED, smoothing),
        lambda out, inputs: (out[0] * inputs.grad_rows).sum(),
        floors.gradients(x, magnitude),
        error_ratio,
    )


def test_a_row_that_is_nearly_right_keeps_its_digits(ops) -> None:
    """A probability of 1 - 2e-9: its gradient is far below the spacing of float32 at 1."""
    hidden = torch.full((1, 1), 20.5, requires_grad=True)
    head = torch.tensor([[0.0], [1.0], [0.0]])
    loss = ops.linear_cross_entropy(hidden, head, None, torch.tensor([1]), -1, 0.0)[0].sum()
    (grad,) = torch.autograd.grad(loss, hidden)
    expected = 2 * torch.tensor(-20.5, dtype=torch.float64).exp()
    assert grad.item() == pytest.approx(-expected.item(), rel=1e-4)


def test_an_ignored_row_may_hold_anything(ops, operands) -> None:
    x = operands(20, 30, 8, bias=True)
    x.z[4] = float("nan")
    targets = torch.arange(20)
    targets[4] = IGNORED
    grads = gradients(
        x,
        lambda *o: ops.linear_cross_entropy(*o, targets, IGNORED, 0.1),
        lambda out, inputs: (out[0] * inputs.grad_rows).sum(),
    )
    assert all(bool(grad.isfinite().all()) for grad in grads)
    assert not grads[0][4].any()


def test_no_rows(ops, operands) -> None:
    x = operands(0, 7, 3, bias=True)
    grads = gradients(x, lambda *o: ops.index_backprop(*o, 1.0, 0.1, 0.5), joint_total)
    assert [tuple(grad.shape) for grad in grads] == [(0, 3), (7, 3), (7,)]
    assert not any(bool(grad.any()) for grad in grads)


def test_repeatable_to_the_bit(ops, operands) -> None:
    x = operands(40, 100, 16, bias=True)
    first, second = (
        gradients(x, lambda *o: ops.index_backprop(*o, 1.0, 0.1, 0.5), joint_total) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
