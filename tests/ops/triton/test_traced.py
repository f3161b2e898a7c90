"""What torch.compile makes of the Triton operators: whole graphs in which their kernels are visible.

Traced with a stand-in for the GPU driver; nothing is launched.
"""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import pytest
import sympy
import torch
from torch._functorch.aot_autograd import aot_function, make_boxed_func
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from ibq_fast.ops import triton

INSTALLED = importlib.util.find_spec("triton") is not None


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver and a device that look like one H100 to those who ask."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    from ibq_fast.ops.triton import plan

    monkeypatch.setattr(plan, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(plan, "units", lambda device: 132)
    stand_in = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32))
    monkeypatch.setattr(driver, "_active", stand_in)


def step(z, codebook, bias):
    """Every operator once."""
    ops = torch.ops.ibq_fast_triton
    joint = ops.index_backprop(z, codebook, bias, 1.0, 0.1, 0.2)
    z_q = ops.straight_through_select(z, codebook, bias, 0.5)[0]
    row_entropy, mean_prob, _ = ops.softmax_statistics(z, codebook, bias, 0.5, 0.2)
    indices = ops.codebook_search(z, codebook, bias, 0.5, False, False)[0]
    loss = ops.linear_cross_entropy(z, codebook, bias, indices, -1, 0.1)[0]
    counts = ops.code_histogram(joint[2], codebook.shape[0])
    value = joint[0].float().sum() + joint[5].sum() + joint[6].square().sum() + z_q.float().sum()
    return value + (row_entropy.sum() + mean_prob.sum()) * loss.sum() + counts.sum()


def kernels(graph) -> list[str]:
    """Names of the Triton kernels that a graph launches, in order."""
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

    return [
        kernel_side_table.get_kernel(node.kwargs["kernel_idx"]).fn.__name__
        for node in graph.graph.nodes
        if node.op == "call_function" and "triton_kernel_wrapper" in str(node.target)
    ]


def forward_of(graph, _):
    """A compiler that leaves a graph as it is."""
    return make_boxed_func(graph.forward)


BACKWARD_OF_BOTH = ["row_gradient", "finish_row_gradient", "code_gradient", "finish_code_gradient"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_kernels_are_visible_in_both_graphs(dtype, hopper) -> None:
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return forward_of(graph, inputs)

    with FakeTensorMode():
        z = torch.empty(300, 256, dtype=dtype, requires_grad=True)
        codebook = torch.empty(1000, 256, dtype=dtype, requires_grad=True)
        bias = torch.empty(1000, requires_grad=True)
        aot_function(step, fw_compiler=keep, bw_compiler=keep)(z, codebook, bias).backward()
        assert z.grad.shape == z.shape
        assert codebook.grad.dtype == dtype
    forward, backward = (kernels(graph) for graph in graphs)
    sweep = ["row_sweep", "finish_rows"]
    with_means = [*sweep, "column_means"]
    assert forward == [*with_means, *sweep, *with_means, *sweep, *sweep, "count_codes"]
    assert sorted(backward) == sorted(["moments"] * 2 + BACKWARD_OF_BOTH * 4)


def test_the_number_of_rows_stays_symbolic(hopper) -> None:
    """A batch of another size is no reason to compile again."""
    environment = ShapeEnv()
    with FakeTensorMode(shape_env=environment) as mode:
        rows = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC, DimDynamic.STATIC])
        z = mode.from_tensor(torch.empty(300, 256).requires_grad_(), symbolic_context=rows)
        codebook = torch.empty(1000, 256, requires_grad=True)
        bias = torch.empty(1000, requires_grad=True)
        function = aot_function(step, fw_compiler=forward_of, bw_compiler=forward_of, dynamic=True)
        function(z, codebook, bias).backward()
    fixed = [guard.expr for guard in environment.guards if isinstance(guard.expr, sympy.Equality)]
    assert not fixed


def test_without_triton_the_reason_is_given() -> None:
    assert (triton.UNAVAILABLE is None) == INSTALLED
