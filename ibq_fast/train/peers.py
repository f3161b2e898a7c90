"""Noticing that a process of a distributed run is gone, whatever the others are waiting in.

A collective whose partner died ends at once with gloo, but with NCCL or HCCL only at their time limit, which
has to be long: a process may rightly wait for another to encode a data set. So every process has a thread
with a connection of its own to the rendezvous store, which every few seconds counts up a number under its
rank and looks whether those of the others still move.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist

from ibq_fast.checkpoint.training import list_checkpoints
from ibq_fast.distributed import world_size
from ibq_fast.train.config import RunConfig
from ibq_fast.train.errors import TrainingInterrupted

EXIT_CODE = 75  # EX_TEMPFAIL: starting again, with --resume, may well succeed


class PeerLostError(RuntimeError):
    """Another process of the run died, failed, or cannot be reached."""


class PeerWatch:
    """Context manager around everything that processes do together; nothing with one process.

    - A peer that failed, or was not heard of for ``run.peer_timeout`` seconds (0: for ever): the process says
      so on standard error, with the last checkpoint, and ends with ``EXIT_CODE``. Its thread does that, since
      the main thread may be in a collective that never returns.
    - A collective that failed because its partner is gone: PeerLostError, saying the same.
    - A process that leaves by an exception tells the others which.
    """

    def __init__(self, run: RunConfig) -> None:
        self._seconds = run.peer_timeout
        self._pause = min(2.0, run.peer_timeout / 5)
        self._checkpoints = Path(run.dir) / "checkpoints"
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> PeerWatch:
        if world_size() > 1 and self._seconds > 0:
            self._rank = dist.get_rank()
            # A clone: a blocking wait of the main thread on its own store would block the heartbeat too.
            store: Any = dist.distributed_c10d._get_default_store()
            self._store = dist.PrefixStore("ibq_fast/peers", store.clone())
            self._thread = threading.Thread(target=self._watch, name="peers", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()
        if isinstance(error, RuntimeError) and world_size() > 1 and is_lost_connection(error):
            reason = self._failure() or f"another process of the run is gone ({_first_line(error)})"
            raise PeerLostError(f"{reason}. {self._advice()}") from error
        if self._thread is None:
            return
        if error is None or isinstance(error, TrainingInterrupted):
            dist.barrier()  # the store may end with the process that holds it: nobody listens any more
        else:
            self._tell(f"{type(error).__name__}: {error}")

    def _advice(self) -> str:
        """What to do now."""
        found = list_checkpoints(self._checkpoints)
        kept = f"The last checkpoint is {found[-1]}" if found else "No checkpoint was written yet"
        return f"{kept}; run.resume goes on from the last one, on any number of processes"

    def _tell(self, message: str) -> None:
        try:
            self._store.set(f"failed/{self._rank}", message)
            if self._rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
                time.sleep(self._pause + 0.5)  # the store ends with this process: they should hear it first
        except RuntimeError as unreachable:  # the store went with the process that held it
            sys.stderr.write(f"the other processes could not be told of the error: {unreachable}\n")

    def _watch(self) -> None:
        others = [rank for rank in range(world_size()) if rank != self._rank]
        heard = dict.fromkeys(others, (b"", time.monotonic()))
        beat = 0
        while not self._over.is_set():
            beat += 1
            try:
                self._store.set(f"alive/{self._rank}", str(beat))
                trouble = self._listen(heard)
            except RuntimeError as error:
                trouble = f"the rendezvous store cannot be reached any more ({_first_line(error)})"
            if trouble is not None and not self._over.is_set():
                os.write(
                    2, f"error: {trouble}. {self._advice()}\n".encode()
                )  # whole, whatever else is written
                os._exit(EXIT_CODE)
            self._over.wait(self._pause)

    def _listen(self, heard: dict[int, tuple[bytes, float]]) -> str | None:
        """What is wrong with a peer, if anything; notes in ``heard`` what it last said, and when."""
        for rank, (last, when) in heard.items():
            key = f"alive/{rank}"
            said: Any = self._store.get(key) if self._store.check([key]) else b""
            now = time.monotonic()
            if said != last:
                heard[rank] = (said, now)
            elif now - when > self._seconds:
                return (
                    f"process {rank} was not heard of for {now - when:.0f} s: killed, or its machine is gone"
                )
        return self._failure()

    def _failure(self) -> str | None:
        """What a peer said of its end."""
        for rank in range(world_size() if self._thread is not None else 0):
            key = f"failed/{rank}"
            try:
                if self._store.check([key]):
                    return f"process {rank} failed: {self._store.get(key).decode()}"
            except RuntimeError as error:
                return f"the rendezvous store cannot be reached any more ({_first_line(error)})"
        return None


def is_lost_connection(error: RuntimeError) -> bool:
    """Whether a collective failed because its partner is gone."""
    if isinstance(error, dist.DistError):
        return True
    text = str(error)
    return "gloo" in text.lower() or "Connection closed by peer" in text or "Connection reset by peer" in text


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]
