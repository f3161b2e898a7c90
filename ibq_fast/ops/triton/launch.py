"""Operands and device as the kernels take them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from triton import knobs

# Read once, as Triton itself does when a kernel is defined.
INTERPRETED: bool = knobs.runtime.interpret
DTYPES = (torch.float32, torch.float16) if INTERPRETED else (torch.float32, torch.bfloat16, torch.float16)


def operand(x: Tensor) -> Tensor:
    """x row-major in memory. ValueError for a dtype that the kernels would compute wrongly."""
    if x.dtype not in DTYPES:
        why = " under Triton's interpreter, which computes bfloat16 wrongly" if INTERPRETED else ""
        names = " or ".join(str(dtype) for dtype in DTYPES)
        raise ValueError(f"operands: expected {names}{why}, got {x.dtype}")
    return x.contiguous()


def device_of(x: Tensor) -> AbstractContextManager[object]:
    """Makes x's device the current one, which is where Triton launches."""
    if x.device.type == "cpu":
        return nullcontext()
    return torch.get_device_module(x.device).device(x.device)


def sizes(z: Tensor, codebook: Tensor) -> tuple[int, int, int]:
    """N, K and D; kernels are compiled for a D, so that a trace takes it as it is."""
    return z.shape[0], codebook.shape[0], int(z.shape[1])


def precision(x: Tensor) -> str:
    """How float32 operands are multiplied: three products of tf32 where the device has them."""
    return "tf32x3" if x.device.type == "cuda" else "ieee"


def empty(like: Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return like.new_empty(shape, dtype=dtype)
