"""Several processes on one machine, with the environment that torchrun gives them.

They are forked from a server that has imported everything once.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

_context: Any = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["ibq_fast.train.tokenizer", "ibq_fast.train.generator", "ibq_fast.evaluate.opening", "torch._dynamo"]
)


def start_ranks(
    world: int, work: Callable[..., int | None], *args: Any, errors: Path | None = None
) -> list[BaseProcess]:
    """Start ``world`` processes that do ``work(*args)``, its result their exit code.

    ``errors``: a folder for what they write to standard error, in files called by their rank.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = []
    for rank in range(world):
        environment = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(world),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
        }
        file = None if errors is None else str(errors / str(rank))
        process = _context.Process(target=_as_rank, args=(environment, file, work, args))
        process.start()
        started.append(process)
    return started


def exit_codes(processes: Sequence[BaseProcess], seconds: float = 60.0) -> list[int | None]:
    """Wait for all; whoever is not done after ``seconds`` is killed (-9)."""
    deadline = time.monotonic() + seconds
    for process in processes:
        process.join(max(deadline - time.monotonic(), 0.0))
        if process.exitcode is None:
            process.kill()
            process.join()
    return [process.exitcode for process in processes]


def run_ranks(world: int, work: Callable[..., int | None], *args: Any) -> None:
    """``start_ranks``, which all have to end well."""
    assert exit_codes(start_ranks(world, work, *args)) == [0] * world


def _as_rank(
    environment: dict[str, str], file: str | None, work: Callable[..., int | None], args: tuple[Any, ...]
) -> None:
    import torch

    if file is not None:
        os.dup2(os.open(file, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), 2)
    os.environ.update(environment)
    multiprocessing.set_start_method("fork", force=True)  # as in a process that torchrun started
    torch.set_num_threads(1)
    sys.exit(work(*args))
