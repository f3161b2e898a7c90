"""The loop both stages share: steps, figures, evaluations, pictures, checkpoints, signals, the end.

A :class:`Task` knows what a step is; the loop knows when things happen. Whatever happens after a step's
update (evaluation, pictures) leaves the random generators as they were, so that a resumed run draws what an
unbroken one would have drawn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from ibq_fast.checkpoint.tensor_tree import piecewise
from ibq_fast.checkpoint.training import (
    CheckpointWriteError,
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from ibq_fast.train.config import RunConfig
from ibq_fast.train.errors import NonFiniteError, TrainingInterrupted
from ibq_fast.train.metrics import MetricsLog
from ibq_fast.train.progress import Reporter, Stopwatch
from ibq_fast.train.rng import rng_state, set_rng_state, untouched_rng
from ibq_fast.train.signals import StopRequest

CHECKPOINTS = "checkpoints"


class Task(Protocol):
    """What is trained."""

    title: str
    images_per_step: int

    def record(self, run_dir: Path) -> None:
        """Write down, at the start, what the run is made of."""

    def update(self, step: int, progress: float) -> dict[str, torch.Tensor]:
        """One optimiser step, the ``step``-th after ``step`` finished ones; returns 0-dim loss terms."""

    def figures(self) -> dict[str, float]:
        """Figures of a logging interval that are not loss terms (learning rate, utilisation)."""

    def evaluate(self) -> dict[str, float]:
        """Figures on held-out data."""

    def picture(self) -> tuple[str, torch.Tensor] | None:
        """A name and a uint8 [C,H,W] grid, on the main process."""

    def parameters(self) -> Mapping[str, torch.Tensor]:
        """What must stay finite."""

    def state(self) -> dict[str, Any]:
        """Named parts that make up the task's whole state."""

    def load_state(self, parts: Mapping[str, Any]) -> None:
        """Inverse of ``state``."""

    def rows_to_read(self, name: str, shape: Sequence[int]) -> slice | None:
        """The rows that this process needs of a saved tensor (``state``'s path to it); None: all of them."""

    def export(self, run_dir: Path) -> Path:
        """Write the trained model in the pretrained format; returns its directory."""


def run_task(task: Task, config: RunConfig, accelerator: Accelerator) -> Path:
    """Train ``task`` to its end and export it; returns the exported model's directory.

    Raises NonFiniteError, TrainingInterrupted (after saving), CheckpointWriteError when the disk is too
    full for the last checkpoint of a run (earlier failures are warnings), FileExistsError when
    ``config.dir`` holds checkpoints and ``config.resume`` is off.
    """
    seconds = None if config.max_minutes is None else config.max_minutes * 60
    with (
        StopRequest() as stop,
        Reporter(
            task.title,
            total_steps=config.steps,
            total_seconds=seconds,
            main=accelerator.is_main_process,
        ) as reporter,
    ):
        return _Loop(task, config, accelerator, reporter, stop).run()


def will_resume(config: RunConfig) -> bool:
    """Whether a run goes on from one of its own checkpoints."""
    return config.resume and bool(list_checkpoints(Path(config.dir) / CHECKPOINTS))


class _Loop:
    def __init__(
        self, task: Task, config: RunConfig, accelerator: Accelerator, reporter: Reporter, stop: StopRequest
    ) -> None:
        self.task = task
        self.config = config
        self.accelerator = accelerator
        self.reporter = reporter
        self.stop = stop
        self.dir = Path(config.dir)
        self.root = self.dir / CHECKPOINTS
        self.step = 0
        self.saved: Path | None = None
        self.clock = Stopwatch()
        self.terms = _Mean()
        self.over = False

    def run(self) -> Path:
        self._resume()
        if self.accelerator.is_main_process:
            self.task.record(self.dir)
        self.log = MetricsLog(
            self.dir,
            self.reporter,
            resume_step=self.step,
            tensorboard=self.config.tensorboard,
            main=self.accelerator.is_main_process,
        )
        try:
            self.over = self._is_over()
            while not self.over:
                self._one_step()
                self.over = self._is_over()
                self._after_step()
            if self.saved is None or not self.saved.name.startswith(f"step-{self.step:08d}"):
                self._save(must=True)
        finally:
            self.log.close()
        exported = self.task.export(self.dir)
        self.reporter.say(f"finished after step {self.step}, {self.clock.seconds:.0f} s; model in {exported}")
        return exported

    def _one_step(self) -> None:
        progress = self._agree(self.reporter.progress(self.step, self.clock.seconds))
        terms = self.task.update(self.step, progress)
        self.step += 1
        # One transfer a step, whatever the number of terms.
        values = torch.stack([term.detach().float() for term in terms.values()]).tolist()
        for name, value in zip(terms, values, strict=True):
            if not math.isfinite(value):
                raise NonFiniteError(self.step, name, str(value), self.saved)
        self.terms.add(dict(zip(terms, values, strict=True)))
        self.reporter.step(self.step, self.clock.seconds, self.step * self.task.images_per_step)

    def _after_step(self) -> None:
        signum = self._stop_signal()
        if self._due(self.config.log_every) or self.over:
            self._log_figures()
        if signum is not None:
            self._save(must=True)
            interrupted = TrainingInterrupted(signum, self.step, self.saved)
            self.reporter.say(str(interrupted))
            raise interrupted
        if self._due(self.config.eval_every) or self.over:
            self._evaluate()
        if self._due(self.config.sample_every) or self.over:
            self._picture()
        if self._due(self.config.save_every) and not self.over:
            self._save(must=False)

    def _is_over(self) -> bool:
        if self.config.steps is not None and self.step >= self.config.steps:
            return True
        minutes = self.config.max_minutes
        return minutes is not None and bool(self._agree(self.clock.seconds >= minutes * 60))

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _log_figures(self) -> None:
        values = {**self._over_processes(self.terms.take()), **self.task.figures()}
        values["images_per_second"] = self.reporter.images_per_second
        self.log.scalars("train", self.step, self.clock.seconds, values)
        shown = ("loss", "reconstruction", "utilisation", "lr")
        self.reporter.figures(
            self.step, self.clock.seconds, {name: values[name] for name in shown if name in values}
        )

    def _over_processes(self, means: dict[str, float]) -> dict[str, float]:
        """The means over all processes, which have the same terms and batches of the same size."""
        if self.accelerator.num_processes == 1:
            return means
        values = torch.tensor(list(means.values()), dtype=torch.float32, device=self.accelerator.device)
        return dict(zip(means, self.accelerator.reduce(values, "mean").tolist(), strict=True))

    def _evaluate(self) -> None:
        with untouched_rng(self.accelerator.device), torch.no_grad():
            values = self.task.evaluate()
        self.log.scalars("eval", self.step, self.clock.seconds, values)
        text = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        self.reporter.say(f"held out, step {self.step}: {text}")

    def _picture(self) -> None:
        with untouched_rng(self.accelerator.device), torch.no_grad():
            shown = self.task.picture()
        if shown is not None:
            self.log.image(shown[0], self.step, shown[1])

    def _save(self, *, must: bool) -> None:
        """Write a checkpoint; a full disk is a warning unless ``must``."""
        for name, tensor in self.task.parameters().items():
            if not bool(torch.isfinite(tensor).all()):
                raise NonFiniteError(self.step, f"weight {name}", "not finite", self.saved)
        states = gather_object([rng_state(self.accelerator.device)])
        parts = self.task.state()
        outcome: list[Any] = [None, None]
        try:
            if self.accelerator.is_main_process:
                parts["loop"] = {"seconds": self.clock.seconds, "rng": states}
                outcome[0] = save_checkpoint(self.root, self.step, parts, keep_last=self.config.keep_last)
        except CheckpointWriteError as error:
            outcome[1] = error
        finally:  # what the main process takes from the others while it writes, all of it even if it failed
            for part in parts.values():
                for collected in piecewise(part):
                    collected.finish()
        folder, failure = self._from_main(outcome)
        if failure is None:
            self.saved = folder
            return
        if must:
            raise failure
        self.reporter.say(f"warning: {failure}")

    def _resume(self) -> None:
        found: list[Any] = [None]
        if self.accelerator.is_main_process:
            if not self.config.resume and list_checkpoints(self.root):
                raise FileExistsError(
                    f"run.dir: {self.dir} already holds checkpoints; expected --resume to go on from them, "
                    f"or another directory"
                )
            self.dir.mkdir(parents=True, exist_ok=True)
            if self.config.resume:
                found[0] = latest_checkpoint(self.root, self.reporter.say, set_aside=True)
        folder = self._from_main(found)[0]
        if folder is None:
            if self.config.resume:
                self.reporter.say(f"no checkpoint to resume in {self.root}, starting at step 0")
            return
        parts = load_checkpoint(folder, self.task.rows_to_read)
        self.task.load_state(parts)
        self.step, self.saved = parts["step"], folder
        self.clock = Stopwatch(parts["loop"]["seconds"])
        states = parts["loop"]["rng"]
        if self.accelerator.process_index < len(states):
            set_rng_state(states[self.accelerator.process_index], self.accelerator.device)
        self.reporter.say(f"resumed from {folder}, step {self.step}")

    def _stop_signal(self) -> int | None:
        """A signal that any process received, known to all of them."""
        if self.accelerator.num_processes == 1:
            return self.stop.signum
        received = gather_object([self.stop.signum])
        return next((signum for signum in received if signum is not None), None)

    def _agree(self, value: Any) -> Any:
        """The main process's ``value``: clocks differ, decisions must not."""
        if self.accelerator.num_processes == 1 or self.config.max_minutes is None:
            return value
        return self._from_main([value])[0]

    def _from_main(self, values: list[Any]) -> list[Any]:
        return broadcast_object_list(values) if self.accelerator.num_processes > 1 else values


class _Mean:
    """Means of the terms since they were last taken."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    def add(self, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
            self._counts[name] = self._counts.get(name, 0) + 1

    def take(self) -> dict[str, float]:
        means = {name: total / self._counts[name] for name, total in self._sums.items()}
        self._sums.clear()
        self._counts.clear()
        return means
