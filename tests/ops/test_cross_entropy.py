"""linear_cross_entropy: the loss of a linear head and its gradients."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ibq_fast.ops import available_backends, cross_entropy, linear_cross_entropy

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMESPACES = {"native": "ibq_fast", "composite": "ibq_fast_composite"}
IGNORED = -7


def make_targets(n: int, k: int, ignored: float = 0.3, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, k, (n,), generator=generator)
    return targets.masked_fill(torch.rand(n, generator=generator) < ignored, IGNORED)


def results(x, targets, smoothing, operator):
    """(loss, gradients...) of ``operator`` with x.grad_rows as the gradient of the loss."""
    leaves = x.leaves()
    loss, _ = operator(*leaves, targets, IGNORED, smoothing)
    grads = torch.autograd.grad(
        (loss * x.grad_rows).sum(), [leaf for leaf in leaves if leaf is not None], materialize_grads=True
    )
    return loss.detach(), *grads


def check(x, targets, smoothing, backend, error_ratio, floors) -> None:
    operator = getattr(torch.ops, NAMESPACES[backend]).linear_cross_entropy
    ours = results(x, targets, smoothing, operator)
    eager = results(x, targets, smoothing, cross_entropy.reference)
    wide = x.to(torch.float64)
    truth = results(wide, targets, smoothing, cross_entropy.reference)
    s = wide.z @ wide.codebook.T
    p = (s if wide.bias is None else s + wide.bias).softmax(dim=1)
    kept = (targets != IGNORED).unsqueeze(1)
    k = p.shape[1]
    q = F.one_hot(targets.clamp_min(0), k) * (1 - smoothing) + smoothing / k
    magnitude = wide.grad_rows.abs().unsqueeze(1) * (p + q) * kept
    limits = (floors.logits(x), *floors.gradients(x, magnitude))
    for name, a, b, t, floor in zip(
        ("loss", "gradient of hidden", "gradient of head", "gradient of bias"),
        ours,
        eager,
        truth,
        limits,
        strict=False,
    ):
        error_ratio(name, a, b, t, floor)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("spread", [0.01, 0.3, 4.0], ids=["uniform", "training", "peaked"])
@pytest.mark.parametrize("size", [(1, 1, 1), (97, 515, 59), (33, 2, 111), (13, 300, 1025)])
def test_agrees_with_the_formula(
    size, spread, smoothing, dtype, backend, operands, error_ratio, floors
) -> None:
    x = operands(*size, dtype=dtype, spread=spread, bias=True)
    check(x, make_targets(*size[:2]), smoothing, backend, error_ratio, floors)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n=st.integers(0, 40),
    k=st.integers(1, 90),
    d=st.integers(1, 70),
    smoothing=st.sampled_from([0.0, 0.2]),
    ignored=st.sampled_from([0.0, 0.5, 1.0]),
    bias=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_any_size(
    n, k, d, smoothing, ignored, bias, dtype, seed, backend, operands, small_blocks, error_ratio, floors
) -> None:
    x = operands(n, k, d, dtype=dtype, bias=bias, seed=seed)
    check(x, make_targets(n, k, ignored, seed), smoothing, backend, error_ratio, floors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_more_rows_than_a_chunk(smoothing, dtype, backend, operands, error_ratio, floors) -> None:
    """The gradient of head adds up over chunks: in float32, whatever its dtype."""
    x = operands(4200, 40, 9, dtype=dtype, bias=True)
    check(x, make_targets(4200, 40, 0.2), smoothing, backend, error_ratio, floors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_vocabulary_of_262144(smoothing, dtype, backend, operands, error_ratio, floors) -> None:
    x = operands(7, 262144, 5, dtype=dtype, bias=True)
    check(x, make_targets(7, 262144), smoothing, backend, error_ratio, floors)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_logits_of_thousands(smoothing, dtype, backend, operands, error_ratio, floors) -> None:
    """One-hot and tied rows: of the 61 codes two pairs are equal, and one pair is every fourth row's best."""
    x = operands(30, 61, 47, dtype=dtype, spread=600.0, bias=True)
    x.codebook[5], x.codebook[9] = x.codebook[17], x.codebook[33]
    x.bias[5], x.bias[9] = x.bias[17], x.bias[33]
    x.z[::4] = x.codebook[5].sign()
    check(x, make_targets(30, 61, 0.1), smoothing, backend, error_ratio, floors)


def test_a_peaked_head_large_enough_to_skip_tiles(backend, operands, error_ratio, floors) -> None:
    """Nearly every tile is negligible; targets lie both on the peak and in tiles that would be left out."""
    x = operands(60, 9000, 16, spread=20.0)
    targets = make_targets(60, 9000, 0.1)
    best = (x.z @ x.codebook.T).argmax(dim=1)
    targets[::2] = best[::2]
    check(x, targets, 0.0, backend, error_ratio, floors)


def test_a_row_that_is_nearly_right_keeps_its_digits(operands) -> None:
    """Probabilities of 1 - 1e-9: the loss and its gradient are far below the spacing of float32 at 1."""
    hidden = torch.full((1, 1), 20.5, requires_grad=True)
    head = torch.zeros(3, 1)
    head[1] = 1.0
    loss = linear_cross_entropy(hidden, head, torch.tensor([1]), reduction="sum")
    (grad,) = torch.autograd.grad(loss, hidden)
    expected = 2 * torch.tensor(-20.5, dtype=torch.float64).exp()
    assert grad.item() == pytest.approx(-expected.item(), rel=1e-5)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_stands_in_for_torch(reduction, smoothing, backend, operands) -> None:
    x = operands(50, 70, 12, bias=True)
    targets = make_targets(50, 70)
    arguments = {"ignore_index": IGNORED, "label_smoothing": smoothing, "reduction": reduction}
    runs = []
    for ours in (True, False):
        hidden, head, bias = x.leaves()
        if ours:
            loss = linear_cross_entropy(hidden, head, targets, bias=bias, backend=backend, **arguments)
        else:
            loss = F.cross_entropy(F.linear(hidden, head, bias), targets, **arguments)
        grads = torch.autograd.grad(loss.square().sum(), (hidden, head, bias))
        runs.append((loss, *grads))
    for ours, theirs in zip(*runs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [0, 5])
def test_nothing_to_learn_from(n, dtype, backend, operands) -> None:
    """No rows, or none that counts: the mean is NaN as in torch, the sum 0, the gradients 0."""
    x = operands(n, 7, 3, dtype=dtype, bias=True)
    targets = torch.full((n,), -100)
    leaves = x.leaves()
    for reduction in ("mean", "sum"):
        loss = linear_cross_entropy(
            leaves[0], leaves[1], targets, bias=leaves[2], reduction=reduction, backend=backend
        )
        assert loss.isnan() if reduction == "mean" else loss == 0
        for leaf, grad in zip(leaves, torch.autograd.grad(loss, leaves), strict=True):
            assert grad.dtype == leaf.dtype
            assert bool((grad == 0).all())


def test_an_ignored_row_may_hold_anything(backend, operands) -> None:
    x = operands(6, 30, 4)
    targets = make_targets(6, 30, 0.0)
    targets[2] = -100
    hidden, head, _ = x.leaves()
    with torch.no_grad():
        hidden[2] = float("nan")
    loss = linear_cross_entropy(hidden, head, targets, backend=backend)
    rest = torch.tensor([0, 1, 3, 4, 5])
    expected = F.cross_entropy(x.z[rest] @ x.codebook.T, targets[rest])
    torch.testing.assert_close(loss.detach(), expected)


def test_nan_reaches_the_loss(backend, operands) -> None:
    x = operands(6, 30, 4)
    x.z[2, 1] = float("nan")
    loss = linear_cross_entropy(x.z, x.codebook, make_targets(6, 30, 0.0), reduction="none", backend=backend)
    assert loss.isnan().tolist() == [False, False, True, False, False, False]


def test_a_masked_class_changes_nothing(backend, operands) -> None:
    x = operands(12, 30, 8, bias=True)
    x.bias[20:] = float("-inf")
    targets = make_targets(12, 20)
    hidden, head, bias = x.leaves()
    ours = linear_cross_entropy(hidden, head, targets, bias=bias, ignore_index=IGNORED, backend=backend)
    truth = F.cross_entropy(x.z @ x.codebook[:20].T + x.bias[:20], targets, ignore_index=IGNORED)
    torch.testing.assert_close(ours.detach(), truth)
    grads = torch.autograd.grad(ours, (hidden, head, bias))
    assert all(bool(g.isfinite().all()) for g in grads)
    assert bool((grads[1][20:] == 0).all())


def test_strides_do_not_matter(backend, operands) -> None:
    x = operands(20, 31, 10)
    targets = make_targets(20, 31, 0.0)
    expected = linear_cross_entropy(x.z, x.codebook, targets, backend=backend)
    wide = torch.stack((x.z, x.z), dim=2)[:, :, 0]
    strided = linear_cross_entropy(
        wide, x.codebook.T.contiguous().T, targets.repeat_interleave(2)[::2], backend=backend
    )
    assert torch.equal(strided, expected)


def test_bias_in_the_dtype_of_hidden(backend, operands) -> None:
    x = operands(9, 31, 10, dtype=torch.bfloat16, bias=True)
    bias = x.bias.bfloat16().requires_grad_()
    loss = linear_cross_entropy(x.z, x.codebook, make_targets(9, 31, 0.0), bias=bias, backend=backend)
    assert loss.dtype == torch.float32
    assert torch.autograd.grad(loss, bias)[0].dtype == torch.bfloat16


T = torch.zeros(3, dtype=torch.int64)
BAD = {
    "hidden: expected [N, C] float, got [2, 3, 4]": {"hidden": torch.zeros(2, 3, 4)},
    "hidden: expected float32, bfloat16, float16 or float64, got torch.int64": {"hidden": T.view(3, 1)},
    "head: expected [K, 4] to fit hidden, K ≥ 1, got [5, 3]": {"head": torch.zeros(5, 3)},
    "head: expected [K, 4] to fit hidden, K ≥ 1, got [0, 4]": {"head": torch.zeros(0, 4)},
    "head: expected torch.float32 like hidden, got torch.float16": {"head": torch.zeros(5, 4).half()},
    "bias: expected [5], one number a class, got [4]": {"bias": torch.zeros(4)},
    "bias: expected torch.float32 with hidden of torch.float32, got torch.float64": {
        "bias": torch.zeros(5).double()
    },
    "targets: expected torch.int64, got torch.int32": {"targets": T.int()},
    "targets: expected [3], one class a row, got [2]": {"targets": T[:2]},
    "targets: expected values in [0, 5) or ignore_index -100, got 5 at position 1": {
        "targets": torch.tensor([-100, 5, -1])
    },
    "targets: expected values in [0, 5) or ignore_index 7, got -100 at position 2": {
        "targets": torch.tensor([7, 0, -100]),
        "ignore_index": 7,
    },
    "label_smoothing: expected a number from 0 to 1, got 1.5": {"label_smoothing": 1.5},
    "reduction: expected one of mean, sum, none, got 'max'": {"reduction": "max"},
    "backend: expected one of native, composite, got 'cudnn'": {"backend": "cudnn"},
}


@pytest.mark.parametrize("message", BAD)
def test_says_what_is_wrong(message) -> None:
    arguments = {"hidden": torch.zeros(3, 4), "head": torch.zeros(5, 4), "targets": T} | BAD[message]
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        linear_cross_entropy(**arguments)


def test_the_native_operator_reads_no_target_out_of_range() -> None:
    op = torch.ops.ibq_fast.linear_cross_entropy
    with pytest.raises(RuntimeError, match="got 5 at position 2"):
        op(torch.zeros(3, 4), torch.zeros(5, 4), None, torch.tensor([0, -100, 5]), -100, 0.0)


@pytest.mark.parametrize("namespace", NAMESPACES.values())
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("bias", [False, True])
def test_opcheck(bias, smoothing, namespace, operands) -> None:
    x = operands(7, 12, 5, bias=bias)
    library = getattr(torch.ops, namespace)
    arguments = (make_targets(7, 12), IGNORED, smoothing)
    torch.library.opcheck(
        library.linear_cross_entropy.default, (*x.leaves(), *arguments), rtol=1e-4, atol=1e-5
    )
    lse = library.linear_cross_entropy(x.z, x.codebook, x.bias, *arguments)[1]
    torch.library.opcheck(
        library.linear_cross_entropy_backward.default,
        (x.grad_rows, x.z, x.codebook, x.bias, *arguments, lse),
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize("op", ["linear_cross_entropy", "linear_cross_entropy_backward"])
def test_both_namespaces_have_one_schema(op) -> None:
    schemas = {
        str(getattr(getattr(torch.ops, name), op).default._schema).split("::")[1]
        for name in NAMESPACES.values()
    }
    assert len(schemas) == 1


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_gradcheck(smoothing, operands, small_blocks) -> None:
    x = operands(9, 26, 2, bias=True, dtype=torch.float64)
    targets = make_targets(9, 26)

    def loss(*leaves):
        operator = torch.ops.ibq_fast_composite.linear_cross_entropy
        return operator(*leaves, targets, IGNORED, smoothing)[0]

    assert torch.autograd.gradcheck(loss, x.leaves())


def test_compiles_without_a_graph_break(backend, operands) -> None:
    torch._dynamo.reset()

    def step(hidden, head, bias, targets):
        return linear_cross_entropy(
            hidden, head, targets, bias=bias, ignore_index=IGNORED, label_smoothing=0.1, backend=backend
        )

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    x, targets = operands(11, 13, 5, bias=True), make_targets(11, 13)
    runs = []
    for function in (step, compiled):
        leaves = x.leaves()
        loss = function(*leaves, targets)
        runs.append((loss, *torch.autograd.grad(loss, leaves)))
    for expected, actual in zip(*runs, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("threads", [1, 2])
def test_repeatable_to_the_bit(threads, backend, operands) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x, targets, runs = operands(64, 900, 32, bias=True), make_targets(64, 900), []
        for _ in range(2):
            leaves = x.leaves()
            loss = linear_cross_entropy(
                leaves[0], leaves[1], targets, bias=leaves[2], ignore_index=IGNORED, backend=backend
            )
            runs.append((loss, *torch.autograd.grad(loss, leaves)))
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    finally:
        torch.set_num_threads(before)


K, C = 65536, 128
PROGRAM = f"""
import torch
from ibq_fast.ops import linear_cross_entropy

def resident(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field)) / 1024

def step(n, k):
    hidden, head = torch.randn(n, {C}, requires_grad=True), torch.randn(k, {C}, requires_grad=True)
    before = resident("VmRSS")
    linear_cross_entropy(hidden, head, torch.zeros(n, dtype=torch.int64)).backward()
    return resident("VmHWM") - before

step(4, 64)
print(step(512, {K}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("backend", available_backends())
def test_no_logits_in_memory(backend) -> None:
    """512 × 65,536 logits are 128 MB, and eager code needs three times that; the head's gradient is 32 MB."""
    environment = {**os.environ, "IBQ_FAST_BACKEND": backend, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    extra = float(done.stdout)
    assert 4 * K * C / 2**20 <= extra < 64, f"{extra:.0f} MB"
