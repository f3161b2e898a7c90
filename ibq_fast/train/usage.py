"""How many codes training uses, over a window of steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ibq_fast.evaluate.usage import CodebookUsage


class UsageWindow:
    """Counts code use over ``steps`` optimiser steps, then starts afresh.

    A codebook of K codes can be used up only by a window that sees several times K tokens: choose ``steps``
    with that in mind. Each process counts its own tokens.
    """

    def __init__(self, codebook_size: int, steps: int, device: torch.device) -> None:
        if steps < 1:
            raise ValueError(f"steps: expected at least 1, got {steps}")
        self._steps = steps
        self._usage = CodebookUsage(codebook_size, device)
        self._seen = 0
        self._complete = False  # whether a window is over; the same on every process, whatever it counted
        self._finished = torch.zeros_like(self._usage.counts)

    def add(self, indices: torch.Tensor) -> None:
        """Count the codes [any shape, int64] of one micro-batch."""
        self._usage.update(indices)

    def end_step(self) -> None:
        """Close an optimiser step; closes the window after ``steps`` of them."""
        self._seen += 1
        if self._seen == self._steps:
            self._complete = True
            self._finished.copy_(self._usage.counts)
            self._usage.counts.zero_()
            self._seen = 0

    @property
    def finished(self) -> bool:
        """Whether a whole window has been counted."""
        return self._complete

    def counts(self) -> torch.Tensor:
        """int64 [K]: of the last finished window, or of the running one before the first is over."""
        return self._finished if self._complete else self._usage.counts

    def state_dict(self, total: Callable[[torch.Tensor], torch.Tensor] = torch.clone) -> dict[str, Any]:
        """``total`` sums a tensor over the processes: what is saved is the counts of all of them."""
        return {
            "counts": total(self._usage.counts.clone()),
            "finished": total(self._finished.clone()),
            "seen": self._seen,
        }

    def load_state_dict(self, state: dict[str, Any], *, main: bool = True) -> None:
        """The counts go to the ``main`` process, so that their sum over any number of them stays right."""
        self._usage.counts.copy_(state["counts"]).mul_(main)
        self._finished.copy_(state["finished"]).mul_(main)
        self._complete = bool(state["finished"].any())
        self._seen = state["seen"]
