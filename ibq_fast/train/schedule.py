"""Learning rate and weight decay as pure functions of how far a run has come: nothing to save, nothing to
drift.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class ScheduleConfig:
    """How the learning rate moves.

    Args:
        kind: after the warm-up, constant; cosine or linear down to final_ratio; or drops, which
            multiplies by drop_ratio at each of drop_steps or drop_epochs.
        warmup_steps: steps of a linear rise to the whole rate.
        warmup_start: share of the rate at which that rise begins.
        plateau: share of what follows the warm-up that is still spent at the full rate (linear only).
        final_ratio: share of the rate at the end (cosine and linear).
        drop_steps: steps at which the rate drops.
        drop_epochs: the same in epochs of the run's data, its processes and batches (not of tar shards).
        drop_ratio: what it is multiplied by at each drop.
    """

    kind: Literal["constant", "cosine", "linear", "drops"] = "constant"
    warmup_steps: int = 0
    warmup_start: float = 0.01
    plateau: float = 0.0
    final_ratio: float = 0.0
    drop_steps: tuple[int, ...] = ()
    drop_epochs: tuple[float, ...] = ()
    drop_ratio: float = 0.1

    def __post_init__(self) -> None:
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps: expected 0 or more, got {self.warmup_steps}")
        if not 0 <= self.plateau < 1:
            raise ValueError(f"plateau: expected a share in [0, 1), got {self.plateau}")
        if not 0 <= self.final_ratio <= 1:
            raise ValueError(f"final_ratio: expected a ratio in [0, 1], got {self.final_ratio}")
        if (self.drop_steps or self.drop_epochs) and self.kind != "drops":
            raise ValueError(f"kind: expected drops with drop_steps or drop_epochs, got {self.kind}")
        if self.drop_steps and self.drop_epochs:
            raise ValueError("drop_epochs: expected drop_steps or drop_epochs, got both")

    def in_steps(self, steps_per_epoch: float | None) -> ScheduleConfig:
        """The schedule with ``drop_epochs`` as steps: of the first update at or after the epoch's end.

        None: data without epochs of a known length; raises ValueError if there are ``drop_epochs``.
        """
        if not self.drop_epochs:
            return self
        if steps_per_epoch is None:
            raise ValueError(
                "optim.schedule.drop_epochs: expected data of a known size (or drop_steps), got tar shards"
            )
        drops = tuple(math.ceil(epoch * steps_per_epoch) for epoch in self.drop_epochs)
        return replace(self, drop_steps=drops, drop_epochs=())


def learning_rate_factor(
    config: ScheduleConfig, step: int, progress: float, total_steps: int | None = None
) -> float:
    """The factor on the learning rate for the update that follows ``step`` finished ones.

    ``progress`` in [0, 1] is the share of the whole run that is over, by steps or by the clock. With
    ``total_steps`` the decay starts exactly where the warm-up ends; without it (a run bounded by the clock
    alone) it follows ``progress`` throughout.
    """
    if step < config.warmup_steps:
        start = config.warmup_start
        return start + (1 - start) * step / config.warmup_steps
    if config.kind == "constant":
        return 1.0
    if config.kind == "drops":
        return config.drop_ratio ** sum(step >= drop for drop in config.drop_steps)
    warm = config.warmup_steps / total_steps if total_steps else 0.0
    done = min(max((progress - warm) / (1 - warm), 0.0), 1.0) if warm < 1 else 1.0
    if config.kind == "cosine":
        rest = 0.5 * (1 + math.cos(math.pi * done))
    else:
        rest = 1.0 if done < config.plateau else (1 - done) / (1 - config.plateau)
    return config.final_ratio + (1 - config.final_ratio) * rest


def weight_decay_at(start: float, end: float | None, progress: float) -> float:
    """Weight decay on its half-cosine way from ``start`` to ``end`` (None: it stays)."""
    if end is None:
        return start
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
