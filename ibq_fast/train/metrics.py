"""Where a run's figures and pictures go: ``metrics.jsonl`` (one object a line) and TensorBoard."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ibq_fast.train.progress import Reporter

FILE = "metrics.jsonl"


class MetricsLog:
    """Scalars and image grids of one run, written by the main process only.

    A line of ``metrics.jsonl`` reads ``{"step": 50, "split": "train", "time": 1753.2, "loss": 0.31, …}``;
    ``time`` is seconds of training, earlier parts of a resumed run included. Lines past ``resume_step`` are
    what a killed run did in vain: they are dropped. A disk that is full does not end the run: it is said
    once.
    """

    def __init__(
        self, run_dir: Path, reporter: Reporter, *, resume_step: int, tensorboard: bool, main: bool
    ) -> None:
        self._reporter = reporter
        self._path = run_dir / FILE
        self._main = main
        self._complained = False
        self._board: Any = None
        if not main:
            return
        self._keep_until(resume_step)
        if tensorboard:
            from torch.utils.tensorboard.writer import SummaryWriter

            self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=resume_step + 1)

    def scalars(self, split: str, step: int, seconds: float, values: Mapping[str, float]) -> None:
        """Write ``values`` under ``split`` (``train`` or ``eval``)."""
        if not self._main:
            return
        line = json.dumps({"step": step, "split": split, "time": round(seconds, 3), **values})
        try:
            with self._path.open("a") as file:
                file.write(line + "\n")
            if self._board is not None:
                for name, value in values.items():
                    self._board.add_scalar(f"{split}/{name}", value, step, walltime=time.time())
        except OSError as error:
            self._complain(error)

    def image(self, name: str, step: int, image: torch.Tensor) -> None:
        """Show a uint8 [C,H,W] picture in TensorBoard."""
        if self._board is not None:
            try:
                self._board.add_image(name, image, step)
            except OSError as error:
                self._complain(error)

    def close(self) -> None:
        if self._board is not None:
            self._board.close()

    def _keep_until(self, step: int) -> None:
        if not self._path.exists():
            return
        kept = [line for line in self._path.read_text().splitlines() if _step_of(line) <= step]
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text("".join(line + "\n" for line in kept))
        os.replace(temporary, self._path)

    def _complain(self, error: OSError) -> None:
        if not self._complained:
            self._complained = True
            self._reporter.say(f"warning: metrics are no longer written: {error}")


def read_metrics(run_dir: Path, split: str) -> list[dict[str, float]]:
    """The lines of a run's ``metrics.jsonl`` that belong to ``split``, oldest first."""
    path = run_dir / FILE
    lines = path.read_text().splitlines() if path.exists() else []
    entries = [json.loads(line) for line in lines if _step_of(line) < float("inf")]
    return [entry for entry in entries if entry.get("split") == split]


def _step_of(line: str) -> float:
    """The step of a line; infinite where a kill tore it."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
