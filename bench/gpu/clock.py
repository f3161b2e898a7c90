"""Time and memory of calls on a device: events around every call, entries in turns, medians."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import torch

WARM_UP = 2
MOST_ROUNDS = 30


class Clock:
    """Measures on ``device``, ``"cuda"`` or, to rehearse, ``"cpu"``."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"

    def once(self, call: Callable[[], Any]) -> float:
        """Seconds of one call on the device."""
        if not self.cuda:
            begun = time.perf_counter()
            call()
            return time.perf_counter() - begun
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000

    def race(self, calls: dict[str, Callable[[], Any]], seconds: float) -> dict[str, list[float]]:
        """Samples of every call, in turns, for about ``seconds``; at least three rounds."""
        for call in calls.values():
            for _ in range(WARM_UP):
                call()
        samples: dict[str, list[float]] = {name: [] for name in calls}
        begun = time.perf_counter()
        for number in range(MOST_ROUNDS):
            for name, call in calls.items():
                samples[name].append(self.once(call))
            if number >= 2 and time.perf_counter() - begun > seconds:
                break
        return samples

    def extra_bytes(self, call: Callable[[], Any]) -> int | None:
        """Device memory that a call takes beyond what was allocated before it; None on the CPU."""
        if not self.cuda:
            return None
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
