"""One definition of an operator, registered in every namespace that offers it.

``ibq_fast`` is defined by the C++ extension, ``ibq_fast_triton`` by the Triton kernels, ``ibq_fast_cupy`` and
``ibq_fast_composite`` here. All carry the same schemas, and all get the same shape function and the same
derivative, so that they differ in arithmetic only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ibq_fast.ops import cupy, native, triton

COMPOSITE_NAMESPACE = "ibq_fast_composite"
NAMESPACES = {
    "native": native.NAMESPACE,
    "triton": triton.NAMESPACE,
    "cupy": cupy.NAMESPACE,
    "composite": COMPOSITE_NAMESPACE,
}
_composite_library = torch.library.Library(COMPOSITE_NAMESPACE, "DEF")
_cupy_library = torch.library.Library(cupy.NAMESPACE, "DEF")


@dataclass(frozen=True)
class Operator:
    """An operator before it is tied to a namespace.

    name, arguments: ``arguments`` is the schema after the name, ``"(Tensor z, ...) -> (...)"``.
    composite: the chunked PyTorch implementation, run on any device.
    fake: shapes and dtypes of the outputs from the namespace and the inputs.
    setup_context, backward: as for ``torch.library.register_autograd``; ``backward`` takes the namespace
    first,
        because a namespace differentiates with its own backward operator. None for both: not differentiable.
    """

    name: str
    arguments: str
    composite: Callable[..., Any]
    fake: Callable[..., Any]
    setup_context: Callable[..., None] | None = None
    backward: Callable[..., Any] | None = None

    def __post_init__(self) -> None:
        if not self.arguments.startswith("(") or "->" not in self.arguments:
            raise ValueError(f'arguments: expected "(...) -> (...)", got {self.arguments!r}')
        if (self.setup_context is None) != (self.backward is None):
            raise ValueError(f"{self.name}: expected setup_context and backward, or neither")


def register(operator: Operator) -> None:
    """Define ``operator`` in Python's namespaces, and complete it in every one that computes it."""
    _composite_library.define(operator.name + operator.arguments)
    _composite_library.impl(operator.name, _without_autocast(operator.composite), "CompositeExplicitAutograd")
    _complete(COMPOSITE_NAMESPACE, operator)
    if native.registered(operator.name):
        _complete(native.NAMESPACE, operator)
    if triton.registered(operator.name):
        triton.define(operator.name, operator.arguments)
        _complete(triton.NAMESPACE, operator)
    _cupy_library.define(operator.name + operator.arguments)
    if cupy.registered(operator.name):
        _complete(cupy.NAMESPACE, operator)


def overload(namespace: str, name: str) -> torch._ops.OpOverload:
    """The callable of operator ``name`` in ``namespace``."""
    return getattr(getattr(torch.ops, namespace), name).default


def saved_lse_dtype(namespace: str, dtype: torch.dtype) -> torch.dtype:
    """Dtype of a log-sum-exp kept for the backward, given that of z.

    The native kernels (and CuPy's, which are the same) keep float64, so that exp(S - lse) stays exact where
    logits are large; the others have to run on devices without float64, and measure the rounding of lse in
    the backward instead.
    """
    if namespace in (native.NAMESPACE, cupy.NAMESPACE) or dtype == torch.float64:
        return torch.float64
    return torch.float32


def _complete(namespace: str, operator: Operator) -> None:
    qualified = f"{namespace}::{operator.name}"

    def fake(*args: Any) -> Any:
        return operator.fake(namespace, *args)

    torch.library.register_fake(qualified, fake)
    if operator.backward is None:
        return
    differentiate = operator.backward

    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return differentiate(namespace, ctx, *grads)

    torch.library.register_autograd(qualified, backward, setup_context=operator.setup_context)


def _without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keep an enabled autocast from lowering the precision of the matrix products inside ``function``."""

    def run(*args: Any) -> Any:
        device_type = args[0].device.type
        if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
            with torch.autocast(device_type, enabled=False):
                return function(*args)
        return function(*args)

    return run


def no_second_derivative(namespace: str, ctx: Any, *grads: torch.Tensor) -> None:
    """Differentiation rule of the backward operators."""
    raise RuntimeError(f"{namespace}: second derivatives of the codebook operators are not defined")


def save_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Context of an operator whose derivative is not taken."""
