"""The operators as Triton kernels, in namespace ``ibq_fast_triton``: NVIDIA GPUs, and Ascend NPUs where
triton-ascend is installed.

No N×K tensor, bounded workspace, no floating-point atomics: results repeat to the bit. Statistics are
float32; float32 operands are multiplied as three products of tf32. With ``TRITON_INTERPRET=1`` set before
the import the kernels run on the CPU instead, slowly, for tests: in float32 and float16, because the
interpreter computes bfloat16 wrongly. The kernels have not been run on a GPU or NPU yet.

A missing or unsuitable Triton is no error: :data:`UNAVAILABLE` keeps the reason for the backend table.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor

NAMESPACE = "ibq_fast_triton"
OLDEST = (3, 5)
FORWARD = (
    "codebook_search",
    "straight_through_select",
    "softmax_statistics",
    "index_backprop",
    "linear_cross_entropy",
    "code_histogram",
)
BACKWARD = tuple(f"{name}_backward" for name in FORWARD[1:5])


def _load() -> str | None:
    """Import Triton; the reason why it cannot be used, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    if torch.version.hip:
        return "the table of tiles has no AMD GPUs"
    try:
        found = importlib.import_module("triton").__version__
    except ImportError as error:
        return f"Triton does not load: {error}"
    if tuple(int(part) for part in found.split(".")[:2]) < OLDEST:
        return f"Triton {found} is older than {'.'.join(map(str, OLDEST))}"
    return None


UNAVAILABLE: str | None = _load()


def registered(op: str) -> bool:
    """Whether operator ``op`` has Triton kernels and Triton can be used."""
    return UNAVAILABLE is None and op in (*FORWARD, *BACKWARD)


def device_types() -> tuple[str, ...]:
    """Device types that the kernels serve in this process."""
    if UNAVAILABLE is not None:
        return ()
    from ibq_fast.ops.triton.launch import INTERPRETED

    if INTERPRETED:
        return ("cpu",)
    return ("cuda", "npu") if importlib.util.find_spec("triton.backends.ascend") else ("cuda",)


def dtypes() -> tuple[torch.dtype, ...]:
    """Dtypes of the operands that the kernels take in this process."""
    if UNAVAILABLE is not None:
        return (torch.float32, torch.bfloat16, torch.float16, torch.int64)
    from ibq_fast.ops.triton.launch import DTYPES

    return (*DTYPES, torch.int64)


def define(op: str, arguments: str) -> None:
    """Define operator ``op`` in :data:`NAMESPACE`; its shape function and derivative are registered
    elsewhere.

    ``torch.compile`` sees the kernels inside. Under the interpreter, whose kernels cannot be traced, the
    operator is opaque.
    """
    from ibq_fast.ops.triton.launch import INTERPRETED, device_of

    module = importlib.import_module(f"{__name__}.{'backward' if op in BACKWARD else 'forward'}")
    function = getattr(module, op)

    @functools.wraps(function)
    def run(first: Tensor, *rest: Any) -> Any:  # the schema is read from annotations, in this module's names
        with device_of(first):
            return function(first, *rest)

    if INTERPRETED:
        torch.library.custom_op(f"{NAMESPACE}::{op}", run, mutates_args=(), schema=arguments)
    else:
        torch.library.triton_op(f"{NAMESPACE}::{op}", run, mutates_args=())
