"""What PyTorch asks of an operator: schema, fake, autograd, compilation; and float64 derivatives."""

from __future__ import annotations

import pytest
import torch

from ibq_fast import ops
from ibq_fast.ops import available_backends, registration, search, select

NAMESPACES = [registration.NAMESPACES[name] for name in available_backends()]
OPERATORS = [
    "codebook_search",
    "straight_through_select",
    "straight_through_select_backward",
    "softmax_statistics",
    "softmax_statistics_backward",
    "index_backprop",
    "index_backprop_backward",
    "code_histogram",
]


def arguments(op: str, x, bias: torch.Tensor | None, namespace: str) -> tuple:
    """Arguments for an operator, differentiable where that means something."""
    library = getattr(torch.ops, namespace)
    z, codebook = x.z, x.codebook
    if op == "code_histogram":
        return torch.tensor([1, 1, 0]), 4
    if op == "codebook_search":
        return z.requires_grad_(), codebook, bias, 0.5, True, False
    if op == "straight_through_select_backward":
        _, _, indices, lse, readout = library.straight_through_select(z, codebook, bias, 0.5)
        return x.grad_z_q, x.grad_codes, z, codebook, bias, 0.5, indices, lse, readout
    if op == "softmax_statistics_backward":
        row_entropy, _, lse = library.softmax_statistics(z, codebook, bias, 0.5, 0.3)
        return x.grad_rows, x.grad_mean, z, codebook, bias, 0.5, 0.3, lse, row_entropy
    if op == "index_backprop_backward":
        out = library.index_backprop(z, codebook, bias, 0.5, 0.2, 0.3)
        saved = *out[2:6], *out[7:]
        return x.grad_z_q, x.grad_codes, x.grad_rows, x.grad_mean, z, codebook, bias, 0.5, 0.2, 0.3, *saved
    leaves = z.requires_grad_(), codebook.requires_grad_(), bias if bias is None else bias.requires_grad_()
    numbers = {"straight_through_select": (0.5,), "softmax_statistics": (0.5, 0.3)}
    return *leaves, *numbers.get(op, (0.5, 0.2, 0.3))


@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize("op", OPERATORS)
@pytest.mark.parametrize("bias", [False, True])
def test_opcheck(op, bias, namespace, operands) -> None:
    x = operands(7, 12, 5, bias=bias)
    overload = getattr(getattr(torch.ops, namespace), op).default
    torch.library.opcheck(overload, arguments(op, x, x.bias, namespace), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("op", OPERATORS)
def test_all_namespaces_have_one_schema(op) -> None:
    first, *others = (
        str(getattr(getattr(torch.ops, namespace), op).default._schema).split("::")[1]
        for namespace in NAMESPACES
    )
    assert all(schema == first for schema in others)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tau", [0.7, 3.0])
def test_gradcheck_of_the_statistics(tau, bias, operands, small_blocks) -> None:
    x = operands(9, 26, 2, bias=bias, dtype=torch.float64, scale=0.6)
    leaves = [leaf for leaf in x.leaves() if leaf is not None]

    def statistics(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        z, codebook, *rest = tensors
        op = torch.ops.ibq_fast_composite.softmax_statistics
        return op(z, codebook, rest[0] if rest else None, 0.6, tau)[:2]

    assert torch.autograd.gradcheck(statistics, leaves)


@pytest.mark.parametrize("bias", [False, True])
def test_gradcheck_of_the_selection(bias, operands, small_blocks) -> None:
    """The forward is a step function; its gradient is by definition that of a smooth surrogate.

    With E0 the codebook held fixed, softmax(S) E0 + (E - E0)[indices] has that gradient at E = E0; it is
    differentiated numerically, and the operator's backward is held against it.
    """
    x = operands(9, 26, 2, bias=bias, dtype=torch.float64, scale=0.6)
    leaves = [leaf for leaf in x.leaves() if leaf is not None]
    indices = search.reference(x.z, x.codebook, x.bias, x.scale)[0]

    class Surrogate(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z, codebook, bias):
            ctx.save_for_backward(z, codebook, bias)
            p = search.logits(z, codebook, bias, x.scale).softmax(dim=1)
            gathered = (codebook - x.codebook)[indices]
            return p @ x.codebook + gathered, codebook[indices]

        @staticmethod
        def backward(ctx, grad_z_q, grad_codes):
            z, codebook, bias = ctx.saved_tensors
            library = torch.ops.ibq_fast_composite
            _, _, found, lse, readout = library.straight_through_select(z, codebook, bias, x.scale)
            grads = library.straight_through_select_backward(
                grad_z_q, grad_codes, z, codebook, bias, x.scale, found, lse, readout
            )
            return grads[0], grads[1], None if bias is None else grads[2]

    def surrogate(*tensors: torch.Tensor):
        z, codebook, *rest = tensors
        return Surrogate.apply(z, codebook, rest[0] if rest else None)

    assert torch.autograd.gradcheck(surrogate, leaves)


def step(z: torch.Tensor, codebook: torch.Tensor, bias: torch.Tensor, backend: str) -> torch.Tensor:
    chosen = ops.straight_through_select(z, codebook, scale=0.5, bias=bias, backend=backend)
    entropy = ops.codebook_entropy(z, codebook, temperature=0.3, bias=bias, backend=backend)
    counts = ops.code_histogram(chosen.indices, codebook.shape[0], backend=backend)
    value = (chosen.z_q - z).square().sum() + chosen.codes.sum() + entropy.sample_entropy
    return value - entropy.codebook_entropy + counts.sum()


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(dynamic, backend, operands) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for n in (6, 9):
        x = operands(n, 13, 5, bias=True, seed=n)
        results = []
        for function in (step, compiled):
            leaves = x.leaves()
            value = function(*leaves, backend)
            results.append((value, *torch.autograd.grad(value, leaves)))
        for expected, actual in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_the_choice_is_made_while_tracing(operands) -> None:
    torch._dynamo.reset()
    x = operands(6, 13, 5)
    graphs = []

    def keep(module, _):
        graphs.append(module)
        return module

    compiled = torch.compile(lambda z, e: ops.codebook_search(z, e).indices, fullgraph=True, backend=keep)
    for name in available_backends():
        ops.set_backend(name)
        try:
            assert torch.equal(compiled(x.z, x.codebook), search.reference(x.z, x.codebook, None, 1.0)[0])
        finally:
            ops.set_backend(None)
    called = [
        node.target.namespace for graph in graphs for node in graph.graph.nodes if "search" in node.name
    ]
    assert called == NAMESPACES


def test_autocast_does_not_lower_the_precision(backend, operands) -> None:
    x = operands(16, 40, 32)
    results = []
    for enabled in (False, True):
        z, codebook, _ = x.leaves()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            chosen = ops.straight_through_select(z, codebook, backend=backend)
            entropy = ops.codebook_entropy(z, codebook, temperature=0.1, backend=backend)
            value = (chosen.z_q * x.grad_z_q).sum() + entropy.sample_entropy - entropy.codebook_entropy
            results.append((value, *torch.autograd.grad(value, (z, codebook))))
    for plain, cast in zip(*results, strict=True):
        assert torch.equal(plain, cast)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_repeatable_to_the_bit(dtype, backend, operands) -> None:
    x = operands(64, 200, 32, dtype=dtype)
    runs = []
    for _ in range(2):
        z, codebook, _ = x.leaves()
        value = select.straight_through_select(z, codebook, backend=backend).z_q.float().square().sum()
        value = value + sum(ops.codebook_entropy(z, codebook, temperature=0.1, backend=backend)[:2])
        runs.append(torch.autograd.grad(value, (z, codebook)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
