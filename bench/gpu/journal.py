"""What a process has begun and ended on the GPU, line by line: a kernel may end it at any moment.

A kernel that reads past its memory leaves a device context in which every later call fails, one that waits
for ever a process that cannot be stopped from within. So each step is written down before it starts, a
step that outlasts its limit takes its process down, and the next process goes on behind what is written.
"""

from __future__ import annotations

import faulthandler
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

DEAD = 86  # exit code of a process whose device context is lost


class Journal:
    """A file of JSON objects, one a line; without a path nothing is written and nothing is known.

    Keys: ``begun`` and ``ended`` (of a step, with its ``outcome`` and, of a failure, its ``words``),
    ``finished`` (of a process that came to its end), and what ``note`` adds.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        records = read(path)
        self.ended: dict[str, str] = {r["ended"]: r["outcome"] for r in records if "ended" in r}
        """Steps of earlier processes that ended, with their outcomes."""
        self.lost = [r["begun"] for r in records if "begun" in r and r["begun"] not in self.ended]
        """Steps that took an earlier process with them, in their order."""

    def note(self, **record: Any) -> None:
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps(record) + "\n")

    @contextmanager
    def step(self, name: str, seconds: float) -> Iterator[None]:
        """Say that a step begins, and end the process should it outlast ``seconds``; where it hung is left in
        a file beside the journal."""
        self.note(begun=name)
        if self.path is None:
            yield
            return
        with self.path.with_suffix(".hung").open("a") as file:
            faulthandler.dump_traceback_later(seconds, exit=True, file=file)
            try:
                yield
            finally:
                faulthandler.cancel_dump_traceback_later()

    def end(self, name: str, outcome: str, words: str = "") -> None:
        self.note(ended=name, outcome=outcome, **({"words": words[-2000:]} if words else {}))

    def finish(self) -> None:
        self.note(finished=True)


def read(path: Path | None) -> list[dict[str, Any]]:
    """The whole lines of a journal; none where there is no file."""
    if path is None or not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


def leave_if_dead(device: str) -> None:
    """End the process when its device context is lost; whoever started it starts another."""
    if device != "cuda":
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        print(f"the device context is lost: {str(error).splitlines()[0]}", flush=True)
        os._exit(DEAD)
