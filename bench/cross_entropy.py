"""The generator's loss, forward and backward.

Nominal cost 6·N·K·C: the logits, and the gradients of both operands. An implementation that recomputes the
logits in its backward does 8·N·K·C.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import eager, truth
from bench.cases import Case, hidden_and_head
from bench.suite import OURS, Entry, Suite, judge
from ibq_fast import ops

# Looked up by name: versions of this package and of PyTorch differ in whether they have them.
_FUSED: Callable[..., Any] | None = getattr(ops, "linear_cross_entropy", None)
_TORCH: Callable[..., Any] | None = getattr(F, "linear_cross_entropy", None)
_OPTIONS: Callable[..., Any] | None = getattr(nn, "LinearCrossEntropyOptions", None)


class Loss(NamedTuple):
    """The loss (0-dim) and both gradients."""

    loss: Tensor
    grad_hidden: Tensor
    grad_head: Tensor


class Problem:
    """hidden, head, targets; the truth and its yardstick on first use."""

    def __init__(self, case: Case) -> None:
        self.hidden, self.head, self.targets = hidden_and_head(case)

    @functools.cached_property
    def truth(self) -> tuple[dict[str, Tensor], truth.Sample]:
        return truth.cross_entropy(self.hidden, self.head, self.targets, torch.float64)

    @functools.cached_property
    def plain(self) -> dict[str, Tensor]:
        return truth.cross_entropy(self.hidden, self.head, self.targets, torch.float32, self.truth[1])[0]


def check(problem: Problem, entry: Entry[Problem], result: Loss) -> None:
    """The loss and sampled gradients by the error-ratio rule; the loss up to a few roundings of it."""
    exact, where = problem.truth
    got = {
        "loss": result.loss,
        "gradient of hidden": result.grad_hidden[where.rows],
        "gradient of target rows": result.grad_head[where.selected],
        "gradient of other rows": result.grad_head[where.others],
    }
    floors = {"loss": 8 * torch.finfo(torch.float32).eps * exact["loss"].item()}
    judge(entry, got, exact, problem.plain, floors)


def _entry(function: Callable[..., Tensor] | None, dtype: str = "float32") -> Any:
    def prepare(problem: Problem) -> Callable[[], Loss]:
        assert function is not None
        hidden = problem.hidden.to(getattr(torch, dtype), copy=True).requires_grad_()
        head = problem.head.to(hidden.dtype, copy=True).requires_grad_()

        def call() -> Loss:
            hidden.grad = head.grad = None
            loss = function(hidden, head, problem.targets)
            loss.backward()
            assert hidden.grad is not None
            assert head.grad is not None
            return Loss(loss.detach(), hidden.grad, head.grad)

        return call

    return prepare


def _compiled(problem: Problem) -> Callable[[], Loss]:
    return _entry(torch.compile(eager.cross_entropy, dynamic=False))(problem)


def _torch_chunked(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    assert _TORCH is not None
    assert _OPTIONS is not None
    return _TORCH(hidden, head, targets, options=_OPTIONS())


def _quick(case: Case) -> bool:
    """A call at more classes takes ten seconds and more, most of it in the same three products as eager's."""
    return case.k <= 1 << 16


_NO_FUSED = None if _FUSED else "ibq_fast.ops has no linear_cross_entropy in this version"
_NO_TORCH = None if _TORCH and _OPTIONS else f"torch {torch.__version__} has no F.linear_cross_entropy"

SUITE: Suite[Problem] = Suite(
    kernel="linear_cross_entropy",
    problem=Problem,
    flops=lambda case: 3 * case.product,
    check=check,
    entries=(
        Entry(OURS, "float32", _entry(_FUSED), missing=_NO_FUSED),
        Entry(OURS, "bfloat16", _entry(_FUSED, "bfloat16"), dtype="bfloat16", missing=_NO_FUSED),
        Entry("eager", "float32", _entry(eager.cross_entropy), nxk=4),
        Entry("eager", "bfloat16", _entry(eager.cross_entropy, "bfloat16"), dtype="bfloat16", nxk=2),
        Entry("torch.compile", "float32", _compiled, nxk=4, compiles=True, serves=_quick),
        Entry(
            "torch linear_cross_entropy",
            "float32",
            _entry(_torch_chunked),
            nxk=1,
            missing=_NO_TORCH,
            serves=_quick,
        ),
    ),
)
