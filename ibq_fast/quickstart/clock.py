"""The quick start's stages: what takes how long, what is left, and how much time each training may take."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class StageClock:
    """Announces stages with the time left, and shares ``total_seconds`` out among them.

    ``expected``: seconds each stage takes on the machine the recipe was made for (two cores), in order. What
    is left is reckoned from these and from how this machine has done so far.
    """

    def __init__(self, expected: Mapping[str, float], total_seconds: float) -> None:
        self._expected = dict(expected)
        self._total = total_seconds
        self._start = time.monotonic()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str, title: str) -> Iterator[None]:
        """Announce stage ``name`` and take its time."""
        number = list(self._expected).index(name) + 1
        self._say(f"[{number}/{len(self._expected)}] {title}  ({self._state()})")
        begin = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - begin

    @property
    def elapsed(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self._start

    def allowance(self, name: str) -> float:
        """Seconds that stage ``name`` may take: its share, by expectation, of the time still left."""
        waiting = sum(seconds for stage, seconds in self._expected.items() if stage not in self.seconds)
        return max(self._total - self.elapsed, 1.0) * self._expected[name] / waiting

    def finish(self) -> None:
        """Say how long it took."""
        self._say(f"done in {_duration(self.elapsed)}")

    def _state(self) -> str:
        done = sum(self._expected[name] for name in self.seconds)
        pace = sum(self.seconds.values()) / done if done else 1.0
        left = pace * sum(seconds for name, seconds in self._expected.items() if name not in self.seconds)
        left = min(left, max(self._total - self.elapsed, 0.0))
        return f"{_duration(self.elapsed)} so far, about {_duration(left)} left"

    def _say(self, text: str) -> None:
        sys.stderr.write(f"quickstart: {text}\n")
        sys.stderr.flush()


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
