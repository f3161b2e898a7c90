"""Checks of what callers pass to a generator. Every failure is a ``ValueError``: argument, expected, got."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ibq_fast.generator.config import GeneratorConfig

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)


def check_classes(class_ids: Tensor, config: GeneratorConfig, *, look: bool) -> None:
    """``class_ids`` must be int [B] in [0, num_classes]; ``look``: read the values too."""
    _check_integers("class_ids", class_ids)
    if class_ids.ndim != 1:
        raise ValueError(f"class_ids: expected [B], got {list(class_ids.shape)}")
    if look:
        _check_range("class_ids", class_ids, config.num_classes)


def check_tokens(tokens: Tensor, class_ids: Tensor, config: GeneratorConfig, *, look: bool) -> None:
    """``tokens`` must be int [B, L], L < rows * columns, in [0, vocab_size), on the device of the classes."""
    _check_integers("tokens", tokens)
    if tokens.ndim != 2 or tokens.shape[0] != class_ids.shape[0]:
        raise ValueError(
            f"tokens: expected [B, L] with B = {class_ids.shape[0]} as in class_ids, got {list(tokens.shape)}"
        )
    if tokens.shape[1] >= config.num_tokens:
        raise ValueError(
            f"tokens: expected fewer than {config.num_tokens} per image (the last has no successor), "
            f"got {tokens.shape[1]}"
        )
    if tokens.device != class_ids.device:
        raise ValueError(f"tokens: expected on {class_ids.device} as class_ids, got {tokens.device}")
    if look:
        _check_range("tokens", tokens, config.vocab_size - 1)


def whole_images(tokens: Tensor, config: GeneratorConfig) -> Tensor:
    """``tokens`` [B, rows * columns] or [B, rows, columns], as [B, rows * columns]."""
    _check_integers("tokens", tokens)
    if tuple(tokens.shape[1:]) not in ((config.num_tokens,), config.grid):
        raise ValueError(
            f"tokens: expected [B, {config.num_tokens}] or [B, {config.grid[0]}, {config.grid[1]}], "
            f"got {list(tokens.shape)}"
        )
    tokens = tokens.flatten(1)
    if tokens.is_cpu:
        _check_range("tokens", tokens, config.vocab_size - 1)
    return tokens


def sampled_classes(
    class_ids: Tensor | Sequence[int], config: GeneratorConfig, device: torch.device
) -> Tensor:
    """The classes to sample as int64 [B] on ``device``."""
    if not isinstance(class_ids, Tensor):
        if isinstance(class_ids, (int, float, str)):
            raise ValueError(f"class_ids: expected one id per image, a sequence, got {class_ids!r}")
        class_ids = torch.as_tensor(class_ids)
        class_ids = class_ids.long() if class_ids.numel() == 0 else class_ids
    check_classes(class_ids, config, look=True)
    return class_ids.to(device=device, dtype=torch.int64)


def check_numbers(**numbers: int) -> None:
    """Seeds and numbers of images."""
    for name, value in numbers.items():
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**63:
            raise ValueError(f"{name}: expected an integer in [0, 2^63), got {value!r}")


def _check_integers(name: str, value: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"{name}: expected an integer tensor, got {type(value).__name__}")
    if value.dtype not in _INTEGERS:
        raise ValueError(f"{name}: expected an integer tensor, got {value.dtype}")


def _check_range(name: str, value: Tensor, largest: int) -> None:
    if value.numel() == 0 or torch.compiler.is_compiling():
        return
    low, high = (int(bound) for bound in value.aminmax())
    if low < 0 or high > largest:
        raise ValueError(f"{name}: expected values in [0, {largest}], got {low} to {high}")
