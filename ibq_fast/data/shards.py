"""Images from tar shards: read in parallel, broken samples skipped and reported, resumable to the sample."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ibq_fast.data.decode import BadImageError
from ibq_fast.data.errors import DataError
from ibq_fast.data.loader import Batch, Gather, ignore_interrupt
from ibq_fast.data.shard_order import LaneShuffle, Progress, Seen, ShardOrder
from ibq_fast.data.shard_reader import ShardSample, decode_sample, read_shard
from ibq_fast.data.transform import SquareCrop, SquareViews

_WEIGHTY = 1000  # the share of bad samples is taken of at least so many
_BAD_AT_ONCE = 100  # so many bad samples are reported without waiting for a whole batch
_log = logging.getLogger(__name__)


class BadSample(NamedTuple):
    """Where a sample is, and why it cannot be used."""

    shard: str
    key: str
    reason: str


class _Packet(NamedTuple):
    """What a lane hands over: good samples, and what became known with them.

    ``seen``: (unit, ordinal) of the good and the bad; ``ends``: (unit, number of its samples).
    """

    lane: int
    images: Tensor
    labels: Tensor
    seen: list[tuple[int, int]]
    ends: list[tuple[int, int]]
    bad: list[BadSample]


class ShardLoader:
    """Batches of this process from tar shards, its share of every epoch.

    Training: ``forever()`` gives full batches without end; one may hold the last samples of an epoch and the
    first of the next, and the processes pass from one epoch to the next at moments of their own.
    ``iter()`` gives the rest of the epoch, its last batches smaller. Evaluation (``train=False``): each
    iteration gives every good sample once over all processes, in a fixed order.

    **Broken samples** (no image file, zero bytes, not an image, truncated, a label that is no integer) and
    broken shards (missing, truncated) are skipped, logged once each with shard, key and reason, and counted:
    ``bad`` of this process, ``share_faults`` of all. When more than ``max_bad_fraction`` of the samples that
    were read (or of 1,000, if they were fewer) were bad: DataError.

    **State.** Which samples were handed out, exactly: see :mod:`ibq_fast.data.shard_order`. In ``forever()``
    a run resumed on as many processes and workers goes on with the very batches.

    Args:
        shards: see ``find_shards``; the same on every process.
        transform: crop, resize, flip; ``SquareViews`` give batches [B, views, C, R, R].
        train: as above.
        channels, max_pixels, max_bad_fraction: as in ``ImageFolder``.
        batch_size: images per batch.
        seed: of order, crops and flips.
        buffer: samples of which a worker draws the next one at random (training).
        resample: shards are drawn with replacement, without epochs (training).
        num_workers: processes that read and decode; 0 does it in this one.
        rank, world_size: this process and how many there are.
        pin_memory: see ``Loader``.

    Raises ValueError when there are fewer shards than workers of all processes, unless they are resampled.
    """

    def __init__(
        self,
        shards: list[str],
        transform: SquareCrop | SquareViews,
        *,
        train: bool,
        channels: int,
        max_pixels: int,
        max_bad_fraction: float,
        batch_size: int,
        seed: int,
        buffer: int = 1000,
        resample: bool = False,
        num_workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        pin_memory: bool | None = None,
    ) -> None:
        self._workers = max(num_workers, 1)
        self._lanes = range(rank * self._workers, (rank + 1) * self._workers)
        lanes = world_size * self._workers
        if train and not resample and len(shards) < lanes:
            raise ValueError(
                f"num_workers: expected at most one for each of {len(shards)} shards, got {self._workers} on "
                f"each of {world_size} processes (or set resample)"
            )
        self.shards, self.transform, self.train = shards, transform, train
        self.channels, self.max_pixels, self.batch_size = channels, max_pixels, batch_size
        self.max_bad_fraction = max_bad_fraction
        self.order = ShardOrder(len(shards), seed, buffer if train else 0, resample and train)
        self.progress = Progress(lanes)
        self._turn = 0  # which worker comes next
        self._num_workers = num_workers
        self._pin = torch.cuda.is_available() if pin_memory is None else pin_memory
        self._torch_loader: Any = None
        self._bad: dict[tuple[str, str], BadSample] = {}
        self._counts = [0, 0]  # bad samples and all samples that were read, epoch after epoch
        self._shared = [0, 0]  # the same over all processes, at the last share_faults

    def __iter__(self) -> Iterator[Batch]:
        """Raises DataError when too many samples are bad."""
        yield from self._batches(endless=False)
        self._turn = 0

    def forever(self) -> Iterator[Batch]:
        """Full batches from the current position, without end."""
        return self._batches(endless=True)

    @property
    def epoch(self) -> int:
        """The epoch that the slowest worker of this process is in."""
        units = [self.progress.unit(lane, self.progress.lanes[lane].index) for lane in self._lanes]
        return min(map(self.order.epoch, units))

    @property
    def bad(self) -> list[BadSample]:
        """The broken samples that any worker of this process met so far, each once."""
        return list(self._bad.values())

    def share_faults(self, gather: Gather) -> dict[str, float]:
        """As ``Loader.share_faults``: ``bad_images`` is the number of broken samples over all processes."""
        reports = gather([(self._counts, list(self._bad.items()))])
        self._shared = [sum(counts[i] for counts, _ in reports) for i in range(2)]
        for _, bad in reports:
            self._bad.update(bad)
        self._check_share(self._shared)
        return {"bad_images": float(len(self._bad))}

    def state_dict(self, gather: Gather = list) -> dict[str, Any]:
        """The position of all processes, which call it together; ``gather`` joins their lists on each."""
        return {
            "shards": _digest(self.shards),
            "seed": self.order.seed,
            "head": self.progress.head,
            "following": self.progress.following,
            "turn": self._turn,
            "workers": self._workers,
            "lanes": gather(self.progress.state_dict(self._lanes)),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state`` was taken, on any number of processes and workers.

        With other shards or another seed the epoch begins anew, which the log says.
        """
        lanes = len(self.progress.lanes)
        for name, here in (("shards", _digest(self.shards)), ("seed", self.order.seed)):
            if state[name] != here:
                _log.warning("data: other %s than the checkpoint's: the epoch begins anew", name)
                self.progress = Progress(lanes)
                self.close()
                return
        self.progress = Progress.restored(state, lanes)
        same = len(state["lanes"]) == lanes and state["workers"] == self._workers
        self._turn = state["turn"] if same else 0
        self.close()

    def close(self) -> None:
        """Stop the workers; the next iteration starts new ones."""
        batches, self._torch_loader = self._torch_loader, None
        if batches is not None and hasattr(batches, "_shutdown_workers"):
            batches._shutdown_workers()

    def _batches(self, *, endless: bool) -> Iterator[Batch]:
        self.close()
        packets = self._torch_loader = iter(
            DataLoader(
                _ShardStream(self, endless),
                batch_size=None,
                num_workers=self._num_workers,
                pin_memory=self._pin,
                worker_init_fn=ignore_interrupt,
                generator=torch.Generator(),  # a DataLoader draws a seed at each start: not the global one's
            )
        )
        try:
            for packet in packets:
                self._take(packet)
                if len(packet.labels):
                    yield Batch(packet.images, packet.labels)
        finally:
            if self._torch_loader is packets:
                self.close()

    def _take(self, packet: _Packet) -> None:
        """Note what a lane handed over."""
        if self.train:
            for unit, ordinal in packet.seen:
                self.progress.handed_out(unit, ordinal)
            for unit, total in packet.ends:
                self.progress.ended(unit, total)
            self.progress.advance(packet.lane)
        self._turn = (self._turn + 1) % self._workers
        for sample in packet.bad:
            if (sample.shard, sample.key) not in self._bad:
                self._bad[sample.shard, sample.key] = sample
                _log.warning("bad sample skipped: %s: %s: %s", *sample)
        self._counts[0] += len(packet.bad)
        self._counts[1] += len(packet.seen)
        self._check_share(self._counts)

    def _check_share(self, counts: list[int]) -> None:
        bad, read = counts
        if bad > self.max_bad_fraction * max(read, _WEIGHTY):
            examples = "; ".join(": ".join(sample) for sample in self.bad[:3])
            raise DataError(
                f"{bad} of {read} samples were bad, more than max_bad_fraction {self.max_bad_fraction}: "
                f"{examples}{'; …' if len(self._bad) > 3 else ''}"
            )


class _ShardStream(IterableDataset[_Packet]):
    """What one worker does: read the units of its lane, shuffle, decode, make batches."""

    def __init__(self, loader: ShardLoader, endless: bool) -> None:
        self.shards, self.transform, self.order = loader.shards, loader.transform, loader.order
        self.channels, self.max_pixels = loader.channels, loader.max_pixels
        self.batch_size, self.train = loader.batch_size, loader.train
        self.lanes, self.turn, self.progress = loader._lanes, loader._turn, loader.progress
        self.endless, self.last_epoch = endless, loader.epoch

    def __iter__(self) -> Iterator[_Packet]:
        worker = get_worker_info()
        at = 0 if worker is None else worker.id
        lane = self.lanes[(at + self.turn) % len(self.lanes)]
        ends: list[tuple[int, int]] = []
        return self._packets(lane, self._shuffled(lane, ends) if self.train else self._in_order(lane), ends)

    def _packets(
        self, lane: int, samples: Iterator[tuple[int, int, ShardSample]], ends: list[tuple[int, int]]
    ) -> Iterator[_Packet]:
        """Samples decoded and batched; ``ends`` is emptied into the packets."""
        images: list[Tensor] = []
        labels: list[int] = []
        seen: list[tuple[int, int]] = []
        bad: list[BadSample] = []
        for unit, ordinal, sample in samples:
            seen.append((unit, ordinal))
            try:
                image, label = decode_sample(sample, self.channels, self.max_pixels)
            except BadImageError as error:
                shard = self.shards[self.order.shard(unit)]
                bad.append(
                    BadSample(shard, sample.key, ": ".join(filter(None, (error.fault.reason, error.detail))))
                )
            else:
                draw, number = self.order.draw(unit), self.order.sample(unit, ordinal)
                images.append(self.transform(image, self.order.seed, draw, number))
                labels.append(label)
            if len(images) == self.batch_size or len(bad) == _BAD_AT_ONCE:
                yield self._packet(lane, images, labels, seen, ends, bad)
                images, labels, seen, bad = [], [], [], []
                ends.clear()
        if seen or ends:
            yield self._packet(lane, images, labels, seen, ends, bad)

    def _packet(
        self,
        lane: int,
        images: list[Tensor],
        labels: list[int],
        seen: list[tuple[int, int]],
        ends: list[tuple[int, int]],
        bad: list[BadSample],
    ) -> _Packet:
        side = self.transform.resolution
        empty = torch.empty(0, self.channels, side, side, dtype=torch.uint8)
        batch = torch.stack(images) if images else empty
        return _Packet(lane, batch, torch.tensor(labels, dtype=torch.int64), seen, list(ends), bad)

    def _shuffled(self, lane: int, ends: list[tuple[int, int]]) -> Iterator[tuple[int, int, ShardSample]]:
        """(unit, ordinal, sample) in the order of the lane; ``ends`` grows as units end."""
        shuffle = LaneShuffle()
        start = self.progress.lanes[lane]
        index, position = start.index, start.position
        while True:
            unit = self.progress.unit(lane, index)
            epoch = self.order.epoch(unit)
            if not self.endless and epoch > self.last_epoch:
                break
            yield from shuffle.ready(epoch, -1)
            known = self.progress.open.get(unit, Seen())
            total = 0
            for ordinal, sample in self._read(unit):
                if ordinal not in known:
                    key = self.order.key(unit, ordinal, position)
                    shuffle.push(epoch, key, position, (unit, ordinal, sample))
                yield from shuffle.ready(epoch, position)
                position += 1
                total += 1
            ends.append((unit, total))
            index += 1
        yield from shuffle.ready(epoch, -1)

    def _in_order(self, lane: int) -> Iterator[tuple[int, int, ShardSample]]:
        """Every lane reads all shards and takes its share of each: a set may have few of them."""
        for unit in range(self.order.shards):
            for ordinal, sample in self._read(unit):
                if ordinal % len(self.progress.lanes) == lane:
                    yield unit, ordinal, sample

    def _read(self, unit: int) -> Iterator[tuple[int, ShardSample]]:
        return enumerate(read_shard(self.shards[self.order.shard(unit)]))


def _digest(shards: list[str]) -> str:
    return hashlib.sha256("\0".join(shards).encode()).hexdigest()
