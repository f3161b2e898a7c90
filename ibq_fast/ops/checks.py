"""Checks of arguments at the Python surface: argument, expectation, what came.

Values are looked at on the CPU and outside of a trace only; a device would have to be waited for.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)


def operands(z: Tensor, codebook: Tensor, bias: Tensor | None, scale: float) -> None:
    """Raise ValueError unless z [N, D], codebook [K, D], bias [K] or None and scale fit together."""
    if z.dim() != 2:
        raise ValueError(f"z: expected [N, D] float, got {list(z.shape)}")
    if codebook.dim() != 2:
        raise ValueError(f"codebook: expected [K, D] float, got {list(codebook.shape)}")
    floating("z", z)
    floating("codebook", codebook)
    if codebook.shape[0] < 1 or codebook.shape[1] < 1:
        raise ValueError(
            f"codebook: expected at least one code and one dimension, got {list(codebook.shape)}"
        )
    if z.shape[1] != codebook.shape[1]:
        raise ValueError(f"z: expected [N, {codebook.shape[1]}] to fit the codebook, got {list(z.shape)}")
    if z.dtype != codebook.dtype:
        raise ValueError(f"codebook: expected {z.dtype} like z, got {codebook.dtype}")
    if z.device != codebook.device:
        raise ValueError(f"codebook: expected device {z.device} like z, got {codebook.device}")
    if bias is not None:
        _bias(bias, z, codebook)
    if not abs(scale) < math.inf:
        raise ValueError(f"scale: expected a finite number, got {scale}")
    finite("z", z)


def _bias(bias: Tensor, z: Tensor, codebook: Tensor) -> None:
    if bias.shape != codebook.shape[:1]:
        raise ValueError(f"bias: expected [{codebook.shape[0]}], one number a code, got {list(bias.shape)}")
    dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    if bias.dtype != dtype:
        raise ValueError(f"bias: expected {dtype} with z of {z.dtype}, got {bias.dtype}")
    if bias.device != z.device:
        raise ValueError(f"bias: expected device {z.device} like z, got {bias.device}")


def head_operands(hidden: Tensor, head: Tensor, bias: Tensor | None) -> None:
    """Raise ValueError unless hidden [N, C], head [K, C] and bias [K] or None fit together."""
    if hidden.dim() != 2:
        raise ValueError(f"hidden: expected [N, C] float, got {list(hidden.shape)}")
    floating("hidden", hidden)
    floating("head", head)
    if head.dim() != 2 or min(head.shape) < 1 or head.shape[1] != hidden.shape[1]:
        raise ValueError(
            f"head: expected [K, {hidden.shape[1]}] to fit hidden, K ≥ 1, got {list(head.shape)}"
        )
    for name, tensor in (("head", head), ("bias", bias)):
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"{name}: expected device {hidden.device} like hidden, got {tensor.device}")
    if head.dtype != hidden.dtype:
        raise ValueError(f"head: expected {hidden.dtype} like hidden, got {head.dtype}")
    if bias is not None:
        if bias.shape != head.shape[:1]:
            raise ValueError(f"bias: expected [{head.shape[0]}], one number a class, got {list(bias.shape)}")
        wide = torch.promote_types(hidden.dtype, torch.float32)
        if bias.dtype not in (hidden.dtype, wide):
            raise ValueError(f"bias: expected {wide} with hidden of {hidden.dtype}, got {bias.dtype}")


def class_targets(targets: Tensor, hidden: Tensor, classes: int, ignore_index: int) -> None:
    """Raise ValueError unless targets is int64 [N], each (on the CPU) in [0, classes) or ignore_index."""
    if targets.dtype != torch.int64:
        raise ValueError(f"targets: expected torch.int64, got {targets.dtype}")
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets: expected [{hidden.shape[0]}], one class a row, got {list(targets.shape)}")
    if targets.device != hidden.device:
        raise ValueError(f"targets: expected device {hidden.device} like hidden, got {targets.device}")
    if _readable(targets):
        bad = ((targets < 0) | (targets >= classes)) & (targets != ignore_index)
        if bad.any():
            at = int(bad.nonzero()[0])
            raise ValueError(
                f"targets: expected values in [0, {classes}) or ignore_index {ignore_index}, "
                f"got {int(targets[at])} at position {at}"
            )


def floating(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOATS:
        raise ValueError(f"{name}: expected float32, bfloat16, float16 or float64, got {tensor.dtype}")


def positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{name}: expected a positive finite number, got {value}")


def code_indices(indices: Tensor, codebook_size: int) -> None:
    """Raise ValueError unless ``indices`` is an integer tensor with values in [0, codebook_size)."""
    if indices.dtype not in INTEGERS:
        raise ValueError(f"indices: expected integers, got {indices.dtype}")
    if codebook_size < 1:
        raise ValueError(f"codebook_size: expected at least 1, got {codebook_size}")
    if _readable(indices) and indices.numel():
        low, high = (int(value) for value in torch.aminmax(indices))
        if low < 0 or high >= codebook_size:
            raise ValueError(f"indices: expected values in [0, {codebook_size}), got {low} to {high}")


def finite(name: str, tensor: Tensor) -> None:
    """Raise ValueError for a NaN or infinity in a CPU tensor."""
    if _readable(tensor) and tensor.numel():
        low, high = (float(value) for value in torch.aminmax(tensor.detach()))
        if not (math.isfinite(low) and math.isfinite(high)):
            bad = int((~torch.isfinite(tensor.detach())).sum())
            raise ValueError(f"{name}: expected finite values, got {bad} NaN or infinite of {tensor.numel()}")


def _readable(tensor: Tensor) -> bool:
    return not torch.compiler.is_compiling() and tensor.device.type == "cpu"
