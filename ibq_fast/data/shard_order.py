"""Which samples of which tar shards a run still has to see, on any number of processes and workers.

**Units.** A pass over the shards, in a random order of its own, is an epoch; all epochs in a row are one
endless sequence of units 0, 1, 2, …: unit u is a shard of epoch u // (number of shards). With ``resample``
each unit is a shard drawn with replacement.

**Lanes.** Each worker of each process is a lane. Of the work, first the units of ``head`` and then those from
``following`` on, lane p of P takes every P-th unit from the p-th on. So no two lanes ever read the same unit,
no lane waits at the end of an epoch, and every sample is seen exactly once per epoch.

**Order in a lane.** Samples are read one after the other; the i-th that a lane reads gets the key
i + buffer · x with a random x in [0, 1), and samples leave in the order (epoch, key). That needs a buffer of
that many samples, and it is a function of (seed, unit, position) alone: leaving out what was already seen
changes nothing in the order of the rest. So a run that is resumed with the same number of lanes goes on with
the very samples, and one that is resumed with another number sees what is left, each sample once, in another
order.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from ibq_fast.data import counter


@dataclass
class Seen:
    """Samples of one unit that were handed out: ordinals below ``prefix``, and those in ``extra``.

    ``total``: how many the shard holds; -1 before its end was reached.
    """

    prefix: int = 0
    extra: set[int] = field(default_factory=set)
    total: int = -1

    def add(self, ordinal: int) -> None:
        self.extra.add(ordinal)
        while self.prefix in self.extra:
            self.extra.remove(self.prefix)
            self.prefix += 1

    def __contains__(self, ordinal: int) -> bool:
        return ordinal < self.prefix or ordinal in self.extra

    @property
    def finished(self) -> bool:
        return self.prefix == self.total


@dataclass(frozen=True)
class ShardOrder:
    """From units to shards, keys and random numbers; a function of these four."""

    shards: int
    seed: int
    buffer: int
    resample: bool

    def epoch(self, unit: int) -> int:
        return unit // self.shards

    def shard(self, unit: int) -> int:
        """The index of the shard that ``unit`` reads."""
        if self.resample:
            return int(counter.random_bits(self.seed, 0, unit, counter.SHARD)[0] % self.shards)
        epoch, at = divmod(unit, self.shards)
        return int(_permutation(self.seed, epoch, self.shards)[at])

    def draw(self, unit: int) -> int:
        """What stands for the epoch in random numbers: resampled units of one shard differ."""
        return unit if self.resample else self.epoch(unit)

    def sample(self, unit: int, ordinal: int) -> int:
        """A number for the sample in random numbers, whatever the order."""
        return (self.shard(unit) << 32) + ordinal

    def key(self, unit: int, ordinal: int, position: int) -> float:
        x = counter.uniform(self.seed, self.draw(unit), self.sample(unit, ordinal), counter.SHUFFLE)[0]
        return position + self.buffer * float(x)


_permutation = lru_cache(maxsize=4)(counter.permutation)


class LaneShuffle:
    """The samples of a lane in the order (epoch, key), as they come in."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, float, int, Any]] = []

    def push(self, epoch: int, key: float, position: int, item: Any) -> None:
        heapq.heappush(self._heap, (epoch, key, position, item))

    def ready(self, epoch: int, position: int) -> Iterator[Any]:
        """Samples that none read from ``position`` of ``epoch`` on can come before."""
        while self._heap and (self._heap[0][0] < epoch or self._heap[0][1] < position):
            yield heapq.heappop(self._heap)[3]


@dataclass
class Lane:
    """``index`` units of a lane are finished, with ``position`` samples in them."""

    index: int = 0
    position: int = 0


class Progress:
    """What was handed out, lane by lane; what is saved, and taken up again on any number of lanes."""

    def __init__(self, lanes: int, following: int = 0) -> None:
        self.head: list[int] = []
        self.following = following
        self.lanes = {number: Lane() for number in range(lanes)}
        self.open: dict[int, Seen] = {}

    def unit(self, number: int, index: int) -> int:
        """The unit that lane ``number`` takes as its ``index``-th."""
        at = number + index * len(self.lanes)
        return self.head[at] if at < len(self.head) else self.following + at - len(self.head)

    def handed_out(self, unit: int, ordinal: int) -> None:
        """A sample was given out."""
        self.open.setdefault(unit, Seen()).add(ordinal)

    def ended(self, unit: int, total: int) -> None:
        """``unit`` turned out to hold ``total`` samples."""
        self.open.setdefault(unit, Seen()).total = total

    def advance(self, number: int) -> None:
        """Leave finished units behind."""
        lane = self.lanes[number]
        while (unit := self.unit(number, lane.index)) in self.open and self.open[unit].finished:
            lane.position += self.open.pop(unit).total
            lane.index += 1

    def state_dict(self, numbers: range) -> list[dict[str, Any]]:
        """The state of lanes ``numbers``; those of all lanes together are the state of the run."""
        states = []
        for number in numbers:
            lane = self.lanes[number]
            units = self._opened(number)
            states.append(
                {
                    "lane": number,
                    "index": lane.index,
                    "position": lane.position,
                    "units": [
                        [unit, seen.total, seen.prefix, sorted(seen.extra)] for unit, seen in units.items()
                    ],
                }
            )
        return states

    @classmethod
    def restored(cls, state: Mapping[str, Any], lanes: int) -> Progress:
        """From ``{"head", "following", "lanes": state_dicts of all lanes}``, for ``lanes`` of them."""
        saved = cls(len(state["lanes"]), state["following"])
        saved.head = list(state["head"])
        for entry in state["lanes"]:
            saved.lanes[entry["lane"]] = Lane(entry["index"], entry["position"])
            for unit, total, prefix, extra in entry["units"]:
                saved.open[unit] = Seen(prefix, set(extra), total)
        return saved if lanes == len(saved.lanes) else saved._divided(lanes)

    def _divided(self, lanes: int) -> Progress:
        """What is left, among another number of lanes."""
        first = min(lane.index for lane in self.lanes.values())
        last = first
        for number, lane in self.lanes.items():
            index = lane.index
            opened = len(self._opened(number))
            while opened:
                opened -= self.unit(number, index) in self.open
                index += 1
            last = max(last, index)
        last = max(last, -(-len(self.head) // len(self.lanes)))
        left = Progress(lanes)
        for index in range(first, last):
            for number, lane in self.lanes.items():
                unit = self.unit(number, index)
                seen = self.open.get(unit, Seen())
                if index >= lane.index and not seen.finished:
                    left.head.append(unit)
                    if unit in self.open:
                        left.open[unit] = seen
        left.following = self.unit(0, last)
        return left

    def _opened(self, number: int) -> dict[int, Seen]:
        """Units of lane ``number`` that were begun and are not left behind."""
        found: dict[int, Seen] = {}
        lanes, start = len(self.lanes), len(self.head)
        at = {unit: k for k, unit in enumerate(self.head)}
        for unit, seen in sorted(self.open.items()):
            k = at.get(unit, unit - self.following + start)
            if k % lanes == number:
                found[unit] = seen
        return found
