"""The ways in which a training run ends early."""

from __future__ import annotations

import signal
from pathlib import Path


class NonFiniteError(FloatingPointError):
    """A loss term, or a weight, became NaN or infinite.

    ``step`` is the optimiser step (counted from 1) at which it was seen, ``term`` the loss term or
    parameter.
    """

    def __init__(self, step: int, term: str, value: str, last_checkpoint: Path | None) -> None:
        kept = (
            f"the last good checkpoint is {last_checkpoint}"
            if last_checkpoint
            else "no checkpoint was written yet"
        )
        super().__init__(
            f"step {step}: {term} is {value}. Training stopped, nothing was saved after it; {kept}. "
            f"Usual remedies: a lower optim.lr, optim.clip_norm, run.mixed_precision=no."
        )
        self.step = step
        self.term = term
        self.last_checkpoint = last_checkpoint


class TrainingInterrupted(SystemExit):
    """SIGINT or SIGTERM: the step was finished and saved. Its exit code is 128 + the signal's number."""

    def __init__(self, signum: int, step: int, checkpoint: Path | None) -> None:
        super().__init__(128 + signum)
        self.signum = signum
        self.step = step
        self.checkpoint = checkpoint

    def __str__(self) -> str:
        saved = (
            f"saved in {self.checkpoint}; continue with --resume" if self.checkpoint else "nothing was saved"
        )
        return f"{signal.Signals(self.signum).name}: stopped after step {self.step}, {saved}"
