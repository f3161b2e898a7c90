"""What PyTorch asks of the operators: opcheck, one schema, whole graphs; the public surface."""

from __future__ import annotations

import pytest
import torch

from ibq_fast import ops as public
from ibq_fast.ops.triton import BACKWARD, FORWARD


@pytest.mark.parametrize("name", [*FORWARD, *BACKWARD])
def test_one_schema(name, ops) -> None:
    schemas = {
        str(getattr(library, name).default._schema).split("::")[1]
        for library in (ops, torch.ops.ibq_fast_composite)
    }
    assert len(schemas) == 1


def test_opcheck(ops, operands) -> None:
    x = operands(5, 9, 5, bias=True)
    leaves = x.leaves()
    out = ops.index_backprop(x.z, x.codebook, x.bias, 0.5, 0.2, 0.3)
    saved = *out[2:6], *out[7:]
    incoming = x.grad_z_q, x.grad_codes, x.grad_rows, x.grad_mean
    targets = torch.tensor([0, 3, -7, 8, 1])
    for op, arguments in (
        (ops.codebook_search, (x.z, x.codebook, x.bias, 0.5, True, False)),
        (ops.index_backprop, (*leaves, 0.5, 0.2, 0.3)),
        (
            ops.index_backprop_backward,
            (*incoming, x.z, x.codebook, x.bias, 0.5, 0.2, 0.3, *saved),
        ),
        (ops.linear_cross_entropy, (*leaves, targets, -7, 0.1)),
        (ops.code_histogram, (torch.tensor([1, 1, 0]), 4)),
    ):
        torch.library.opcheck(op.default, arguments, rtol=1e-4, atol=1e-5)


def test_served_when_asked_for_and_never_unasked(operands) -> None:
    x = operands(6, 13, 5)
    assert public.available_backends() == ("native", "triton", "composite")
    assert not any(row.chosen for row in public.backend_report() if row.backend == "triton")
    found = public.straight_through_select(x.z, x.codebook, backend="triton")
    assert torch.equal(found.indices, (x.z @ x.codebook.T).argmax(dim=1))
    with pytest.raises(ValueError, match=r"'triton' .the backend argument. cannot serve .* torch.bfloat16"):
        public.codebook_search(x.z.bfloat16(), x.codebook.bfloat16(), backend="triton")


def test_compiles_whole(operands) -> None:
    x = operands(11, 13, 5, bias=True)

    def step(z, codebook, bias):
        out = public.index_backprop(z, codebook, bias=bias, temperature=0.3, backend="triton")
        return out.z_q.square().sum() + out.sample_entropy - out.codebook_entropy

    runs = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves = x.leaves()
        value = function(*leaves)
        runs.append((value, *torch.autograd.grad(value, leaves)))
    for expected, actual in zip(*runs, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
