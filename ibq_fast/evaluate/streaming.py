"""A set of images measured block by block: over any number of processes, taken up after any interruption.

Every process measures its share of the blocks and saves what it has, from time to time and at the end, into
a folder that all of them see. A new start, on as many processes as may be, adds up what it finds there and
shares out the rest.
"""

from __future__ import annotations

import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ibq_fast.checkpoint.training import latest_checkpoint, load_checkpoint, save_checkpoint
from ibq_fast.distributed import world_size
from ibq_fast.evaluate.sources import Block, ImageSource
from ibq_fast.evaluate.tally import BLOCK, Tally

_ROWS = 16

Measure = Callable[[Block, Tally], None]
Say = Callable[[str], None]


def batches(block: Block, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(images, indices) of at most ``size`` images, rounded up to a multiple of 16. There may be more images
    than
    indices: the last one repeated, up to a multiple of 16.

    A library's convolutions may round otherwise for another number of images; on the CPUs measured they do
    not between multiples of 16. So results do not depend on the batch size."""
    size = -(-size // _ROWS) * _ROWS
    for images, indices in zip(block.images.split(size), block.indices.split(size), strict=True):
        missing = -len(images) % _ROWS
        yield torch.cat([images, images[-1:].expand(missing, -1, -1, -1)]), indices


def rank() -> int:
    """This process's number; 0 without others."""
    return dist.get_rank() if world_size() > 1 else 0


def wait_for_all() -> None:
    """Return when every process has come here."""
    if world_size() > 1:
        dist.barrier()


def same_everywhere(value: Any) -> Any:
    """The main process's ``value``, on every process."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def measure_all(
    source: ImageSource,
    measure: Measure,
    folder: Path,
    fingerprint: str,
    *,
    save_seconds: float = 60.0,
    say: Say = lambda line: None,
) -> Tally | None:
    """Call ``measure`` with every block of ``source``; on the main process the tally of all of them, on
    others None.

    folder: for progress; the caller removes it when it is done. fingerprint: of everything that the
    measurements depend on; progress that was made under another one is thrown away.
    """
    blocks = -(-len(source) // BLOCK)
    tally = Tally(len(source))
    if rank() == 0:
        tally = _take_up(folder, fingerprint, len(source), say)
    remaining = same_everywhere((~tally.done).nonzero().flatten().tolist())
    mine = remaining[rank() :: world_size()]
    last_save = last_line = time.monotonic()
    for done, (number, block) in enumerate(_prefetched(source, mine), 1):
        tally.unreadable += block.unreadable
        if len(block.images):
            measure(block, tally)
            tally.seen[block.indices] = True
        tally.done[number] = True
        now = time.monotonic()
        if done < len(mine) and now - last_save >= save_seconds:
            _save(folder, fingerprint, tally)
            last_save = time.monotonic()
        if rank() == 0 and now - last_line >= 10.0:
            so_far = blocks - len(remaining) + min(done * world_size(), len(remaining))
            say(f"{min(so_far * BLOCK, len(source)):,} of {len(source):,} images")
            last_line = now
    if world_size() > 1:
        if rank() > 0:
            _save(folder, fingerprint, tally)
        wait_for_all()
        if rank() > 0:
            return None
        for other in range(1, world_size()):
            part = _load(folder / f"rank-{other}", fingerprint, len(source), say)
            if part is None:
                raise OSError(
                    f"{folder}: expected a folder that all processes see; rank {other}'s part is not there"
                )
            tally.merge(part)
    return tally


def _prefetched(source: ImageSource, numbers: list[int]) -> Iterator[tuple[int, Block]]:
    """(number, block), the next one being read meanwhile."""
    with ThreadPoolExecutor(1, thread_name_prefix="block") as reader:
        waiting: deque[tuple[int, Future[Block]]] = deque()
        for number in numbers:
            waiting.append((number, reader.submit(source.block, number * BLOCK, (number + 1) * BLOCK)))
            if len(waiting) == 2:
                yield waiting[0][0], waiting.popleft()[1].result()
        for number, block in waiting:
            yield number, block.result()


def _take_up(folder: Path, fingerprint: str, images: int, say: Say) -> Tally:
    """What earlier processes saved, added up and saved as the main process's own; other parts are removed."""
    parts = [part for f in sorted(folder.glob("rank-*")) if (part := _load(f, fingerprint, images, say))]
    tally = Tally(images)
    # The main process's part may hold what an older part of another one holds too: the larger first.
    for part in sorted(parts, key=lambda part: -int(part.done.sum())):
        if not bool((part.done & tally.done).any()):
            tally.merge(part)
    if int(tally.done.sum()):
        say(f"taken up: {int(tally.done.sum())} of {len(tally.done)} blocks were measured before")
        _save(folder, fingerprint, tally)
    for old in folder.glob("rank-*"):
        if old.name != "rank-0" or not int(tally.done.sum()):
            shutil.rmtree(old)
    return tally


def _save(folder: Path, fingerprint: str, tally: Tally) -> None:
    parts = {"tally": {"fingerprint": fingerprint, **tally.state_dict()}}
    save_checkpoint(folder / f"rank-{rank()}", int(tally.done.sum()), parts, keep_last=1)


def _load(folder: Path, fingerprint: str, images: int, say: Say) -> Tally | None:
    newest = latest_checkpoint(folder, say)
    if newest is None:
        return None
    state = load_checkpoint(newest)["tally"]
    if state["fingerprint"] != fingerprint or state["images"] != images:
        say(f"{folder}: progress of another evaluation, thrown away")
        return None
    return Tally.from_state(state)
