"""Timing in turns: every round runs every entry once, so that a disturbance meets all of them alike.

pytest-benchmark records; the clock is here, because it would time one entry after the other. A recorded
benchmark replays the samples of its entry (:class:`Replay`).
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bench import machine
from bench.cases import Case
from bench.suite import Entry, Suite

# A sample is at least this long: shorter calls are repeated within it, after one that is not timed, because
# the threads of the library before may still be spinning and the caches hold its data.
MIN_SAMPLE_SECONDS = 0.02
MIN_ROUNDS, MAX_ROUNDS = 3, 40
# Rounds this long are repeated once only.
LONG_ROUND_SECONDS = 15.0


@dataclass
class Lane:
    """An entry's samples in seconds a call, or the reason why it may not be timed."""

    samples: list[float] = field(default_factory=list)
    wrong: str | None = None


@dataclass
class Race:
    """Lanes by entry name, and the peaks in GFLOP/s that were measured in the same rounds, by dtype."""

    lanes: dict[str, Lane]
    peaks: dict[str, list[float]]


class Replay:
    """A timer for pytest-benchmark whose every second reading is a given duration after the one before."""

    def __init__(self) -> None:
        self._durations: list[float] = []
        self._now = 0.0
        self._started = False

    def load(self, durations: Sequence[float]) -> None:
        self._durations, self._started = list(durations), False

    def __call__(self) -> float:
        if self._started:
            self._now += self._durations.pop(0)
        self._started = not self._started
        return self._now


def percentiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """p20, p50, p80, interpolated."""
    low, middle, high = np.percentile(np.asarray(samples), [20, 50, 80])
    return float(low), float(middle), float(high)


def run(suite: Suite[Any], case: Case, entries: Sequence[Entry[Any]], seconds: float) -> Race:
    """Check every entry against the truth, then time those that are right for about ``seconds``."""
    problem = suite.problem(case)
    lanes = {entry.name: Lane() for entry in entries}
    calls, repeats = {}, {}
    for entry in entries:
        call = entry.prepare(problem)
        begun = time.perf_counter()
        result = call()
        first = time.perf_counter() - begun
        try:
            suite.check(problem, entry, result)
        except AssertionError as error:
            lanes[entry.name].wrong = str(error)
            continue
        finally:
            del result
        calls[entry.name] = call
        repeats[entry.name] = 1 if first > 1 and not entry.compiles else _repeats(call)
    race = Race(lanes, {dtype: [] for dtype in machine.KINDS})
    names = list(calls)
    gc.collect()
    gc.disable()
    try:
        begun = time.perf_counter()
        for number in range(MAX_ROUNDS if names else 0):
            for dtype, peaks in race.peaks.items():
                peaks.append(machine.peak_gflops(dtype))
            shift = number % len(names)
            for name in names[shift:] + names[:shift]:
                lanes[name].samples.append(_sample(calls[name], repeats[name]))
            spent = time.perf_counter() - begun
            least = 2 if spent / (number + 1) > LONG_ROUND_SECONDS else MIN_ROUNDS
            if number + 1 >= least and spent >= seconds:
                break
    finally:
        gc.enable()
    return race


def _repeats(call: Any) -> int:
    """Calls that fill a sample; one has been made before, so the one here is warm."""
    begun = time.perf_counter()
    call()
    return max(1, math.ceil(MIN_SAMPLE_SECONDS / (time.perf_counter() - begun)))


def _sample(call: Any, repeats: int) -> float:
    if repeats > 1:
        call()
    begun = time.perf_counter()
    for _ in range(repeats):
        result = call()
    ended = time.perf_counter()
    del result
    return (ended - begun) / repeats
