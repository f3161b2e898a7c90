"""How many threads training goes fastest with, here and now.

Steps of a small network are many short parallel regions. On idle cores all of them help; beside other work on
the same cores every region waits for its last thread to be scheduled, and one thread was up to twenty times
as fast as two. So it is measured, before each training, rather than assumed.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

_BATCH, _CHANNELS, _SIDE, _LAYERS = 16, 32, 32, 3
_REPEATS = 12
# One look may meet a moment's disturbance: two must agree, the middle of three decides where they do not.
_LOOKS = 3
# Measured times differ by chance: more threads are taken only where they clearly help.
_GAIN = 0.9


def use_fastest_threads(most: int) -> int:
    """Set PyTorch's threads to the fastest of 1, 2, 4, … ``most`` and return that number; takes 2 seconds."""
    looks: list[int] = []
    while len(looks) < _LOOKS and len(looks) == len(set(looks)):
        looks.append(choose_threads(most, _seconds))
    agreed = sorted(looks)[len(looks) // 2]
    torch.set_num_threads(agreed)
    return agreed


def choose_threads(most: int, seconds: Callable[[float], float]) -> int:
    """One look. ``seconds(limit)`` times work with the threads now set, giving up at ``limit``."""
    best, least = 1, float("inf")
    for count in _candidates(most):
        torch.set_num_threads(count)
        taken = seconds(least * _GAIN)
        if taken >= least * _GAIN:
            break
        best, least = count, taken
    torch.set_num_threads(best)
    return best


def _candidates(most: int) -> list[int]:
    counts = []
    count = 1
    while count < most:
        counts.append(count)
        count *= 2
    return [*counts, max(most, 1)]


def _seconds(limit: float) -> float:
    """Seconds of some forward and backward passes like a tokenizer's; cut off once they exceed ``limit``."""
    images = torch.ones(_BATCH, _CHANNELS, _SIDE, _SIDE)
    weights = [torch.full((_CHANNELS, _CHANNELS, 3, 3), 1e-3, requires_grad=True) for _ in range(_LAYERS)]
    start = time.monotonic()
    _pass(images, weights)
    if time.monotonic() - start >= limit:  # busy cores: a first pass alone can take seconds
        return time.monotonic() - start
    start = time.monotonic()
    for _ in range(_REPEATS):
        _pass(images, weights)
        if time.monotonic() - start >= limit:
            break
    return time.monotonic() - start


def _pass(images: torch.Tensor, weights: list[torch.Tensor]) -> None:
    x = images
    for weight in weights:
        x = x + F.conv2d(F.silu(F.group_norm(x, _CHANNELS)), weight, padding=1)
    torch.autograd.grad(x.mean(), weights)
