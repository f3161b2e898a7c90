"""Forward operators: every output against float64, at ragged sizes; ties, NaN, masks, no rows."""

from __future__ import annotations

import pytest
import torch

from ibq_fast.ops import cross_entropy, entropy, search, select
from ibq_fast.ops.index_backprop import reference as joint_reference

DTYPES = [torch.float32, torch.float16]
DIMENSIONS = [1, 8, 33, 64, 256]
IGNORED = -7


def check(x, names, ours, formula, error_ratio, floor) -> None:
    """``formula`` of operands (z, codebook, bias) gives the tensors that ``names`` lists."""
    eager = formula(x.z, x.codebook, x.bias)
    wide = x.to(torch.float64)
    truth = formula(wide.z, wide.codebook, wide.bias)
    for name, a, b, t in zip(names, ours, eager, truth, strict=True):
        error_ratio(name, a, b, t, floor * max(1.0, t.abs().max().item()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", DIMENSIONS)
@pytest.mark.parametrize("bias", [False, True])
def test_search(d, dtype, bias, ops, operands, floors, error_ratio) -> None:
    x = operands(37, 75, d, dtype=dtype, bias=bias, scale=0.5)
    for with_lse in (False, True):
        indices, best, lse = ops.codebook_search(x.z, x.codebook, x.bias, 0.5, with_lse, False)
        wide = x.to(torch.float64)
        assert torch.equal(indices, search.logits(wide.z, wide.codebook, wide.bias, 0.5).argmax(dim=1))
        assert lse.shape == ((37,) if with_lse else (0,))
    check(
        x,
        ("max", "lse"),
        (best, lse),
        lambda *o: search.reference(*o, 0.5)[1:],
        error_ratio,
        floors.logits(x),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", DIMENSIONS)
def test_joint_forward(d, dtype, ops, operands, floors, error_ratio) -> None:
    x = operands(21, 75, d, dtype=dtype, bias=True, scale=0.5)
    out = ops.index_backprop(x.z, x.codebook, x.bias, 0.5, 0.2, 0.3)
    formula = lambda *o: joint_reference(*o, 0.5, 0.2, 0.3)  # noqa: E731
    wide = x.to(torch.float64)
    assert torch.equal(out[2], formula(wide.z, wide.codebook, wide.bias)[2])
    assert torch.equal(out[0], x.codebook[out[2]])
    assert torch.equal(out[1], out[0])
    kept = ("lse", "readout", "row entropy", "mean probability", "lse of S/τ")
    floor = floors.logits(x) / 0.3 + torch.finfo(dtype).eps
    check(x, kept, out[3:8], lambda *o: formula(*o)[3:8], error_ratio, floor)
    assert out[8].shape == (2, 0, 0)


@pytest.mark.parametrize("spread", [0.02, 2.0], ids=["flat", "peaked"])
def test_select_and_statistics(spread, ops, operands, floors, error_ratio) -> None:
    x = operands(37, 130, 33, spread=spread)
    floor = floors.logits(x)
    found = ops.straight_through_select(x.z, x.codebook, None, 1.0)
    check(x, ("lse", "readout"), found[3:], lambda *o: select.reference(*o, 1.0)[3:], error_ratio, floor)
    found = ops.softmax_statistics(x.z, x.codebook, None, 1.0, 0.05)
    names = ("row entropy", "mean probability", "lse")
    check(x, names, found, lambda *o: entropy.reference(*o, 1.0, 0.05), error_ratio, floor / 0.05)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("d", [33, 256])
def test_cross_entropy(d, smoothing, ops, operands, floors, error_ratio) -> None:
    x = operands(37, 75, d, bias=True)
    targets = torch.arange(37) * 2
    targets[::5] = IGNORED
    x.z[5] = float("nan")  # an ignored row may hold anything
    found = ops.linear_cross_entropy(x.z, x.codebook, x.bias, targets, IGNORED, smoothing)
    assert not found[0][::5].any()
    rows = targets != IGNORED
    assert rows.sum() == 29

    def formula(z, codebook, bias):
        return cross_entropy.reference(z[rows], codebook, bias, targets[rows], IGNORED, smoothing)

    x.z[5] = 0.0
    check(x, ("loss", "lse"), (found[0][rows], found[1][rows]), formula, error_ratio, floors.logits(x))


def test_ties_go_to_the_lowest_index(ops) -> None:
    """Equal codes stand within a tile, across tiles and across splits."""
    codebook = torch.randint(-3, 4, (1, 8)).float().repeat(200, 1)  # whole numbers: equal sums are equal
    codebook[:, 0] = 1.0
    z = torch.randint(-3, 4, (19, 8)).float()
    assert not ops.codebook_search(z, codebook, None, 1.0, False, False)[0].any()
    codebook[:45] = -codebook[45]
    z = codebook[45].repeat(19, 1)
    for with_lse in (False, True):
        assert (ops.codebook_search(z, codebook, None, 1.0, with_lse, False)[0] == 45).all()
    assert (ops.straight_through_select(z, codebook, None, 1.0)[2] == 45).all()


@pytest.mark.parametrize("place", ["z", "codebook"])
@pytest.mark.parametrize("with_lse", [False, True])
def test_a_nan_gives_index_zero(with_lse, place, ops, operands) -> None:
    x = operands(20, 100, 8)
    (x.z if place == "z" else x.codebook)[17, 3] = float("nan")
    indices, best, lse = ops.codebook_search(x.z, x.codebook, None, 1.0, with_lse, False)
    bad = torch.arange(20) == 17 if place == "z" else torch.ones(20, dtype=torch.bool)
    assert torch.equal(best.isnan(), bad)
    assert not indices[bad].any()
    assert not with_lse or torch.equal(lse.isnan(), bad)
    expected = search.reference(x.z, x.codebook, None, 1.0)[0]
    assert torch.equal(indices[~bad], expected[~bad])


@pytest.mark.parametrize("place", [0, 31, 64, 99])
def test_a_masked_code_is_never_found(place, ops, operands) -> None:
    x = operands(9, 100, 8, bias=True)
    x.bias[:] = float("-inf")
    x.bias[place] = 0.0
    indices, _, lse = ops.codebook_search(x.z, x.codebook, x.bias, 1.0, True, False)
    assert (indices == place).all()
    torch.testing.assert_close(lse, x.z @ x.codebook[place])
    row_entropy, mean, _ = ops.softmax_statistics(x.z, x.codebook, x.bias, 1.0, 0.1)
    assert not row_entropy.any()
    torch.testing.assert_close(mean, (torch.arange(100) == place).float())


def test_histogram(ops) -> None:
    indices = torch.randint(0, 50, (700,))
    assert torch.equal(ops.code_histogram(indices, 60), torch.bincount(indices, minlength=60))
    assert not ops.code_histogram(indices[:0], 60).any()


def test_no_rows(ops, operands) -> None:
    x = operands(0, 7, 3, bias=True)
    assert [t.shape for t in ops.codebook_search(x.z, x.codebook, x.bias, 1.0, True, False)] == [(0,)] * 3
    shapes = [tuple(t.shape) for t in ops.index_backprop(x.z, x.codebook, x.bias, 1.0, 0.1, 0.5)]
    assert shapes == [(0, 3), (0, 3), (0,), (0,), (0, 3), (0,), (7,), (0,), (2, 0, 0), (0,)]
    assert ops.linear_cross_entropy(x.z, x.codebook, x.bias, torch.zeros(0).long(), -1, 0.0)[0].shape == (0,)


def test_strides_do_not_matter(ops, operands) -> None:
    x = operands(20, 31, 10)
    expected = ops.codebook_search(x.z, x.codebook, None, 1.0, True, False)
    found = ops.codebook_search(x.z.T.contiguous().T, x.codebook.repeat(1, 2)[:, :10], None, 1.0, True, False)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_bfloat16_is_refused(ops) -> None:
    z = torch.zeros(2, 3, dtype=torch.bfloat16)
    with pytest.raises(
        ValueError, match=r"interpreter, which computes bfloat16 wrongly, got torch\.bfloat16"
    ):
        ops.codebook_search(z, z, None, 1.0, False, False)
