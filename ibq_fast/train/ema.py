"""Exponential moving average of exactly the trained weights, by foreach kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ibq_fast.train.sharding import local


class WeightAverage:
    """Averages ``module``'s trainable parameters: avg ← d·avg + (1−d)·weight, d = min(decay, (1+n)/(10+n)).

    The average starts as a copy of the weights at the first :meth:`update`, so a codebook that is
    initialised from the first batch does not drag its discarded values along. Buffers are the module's own,
    not averaged. With ``on_cpu`` the averages live in the CPU's memory and cost a device none.
    """

    def __init__(self, module: nn.Module, decay: float, *, on_cpu: bool = False) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"decay: expected a number in (0, 1), got {decay}")
        self.decay = decay
        self.updates = 0
        self._on_cpu = on_cpu
        self._names = [name for name, p in module.named_parameters() if p.requires_grad]
        self._weights: list[torch.Tensor] = [p for p in module.parameters() if p.requires_grad]
        self._average: list[torch.Tensor] = []

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights as they are now."""
        weights = [p.detach().cpu() for p in self._weights] if self._on_cpu else self._weights
        if not self._average:
            self._average = [p.detach().clone() for p in weights]
        else:
            decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
            torch._foreach_lerp_(local(self._average), local(weights), 1 - decay)
        self.updates += 1

    @contextmanager
    @torch.no_grad()
    def applied(self) -> Iterator[None]:
        """Inside, the module computes with the averaged weights."""
        if not self._average:
            yield
            return
        live = [p.detach().clone() for p in self._weights]
        torch._foreach_copy_(local(self._weights), local(self._average))
        try:
            yield
        finally:
            torch._foreach_copy_(local(self._weights), local(live))

    def state_dict(self) -> dict[str, Any]:
        average = dict(zip(self._names, self._average, strict=False))
        return {"decay": self.decay, "updates": self.updates, "average": average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError when the names do not match the module's."""
        self.updates = state["updates"]
        average = state["average"]
        if average and sorted(average) != sorted(self._names):
            odd = sorted(set(average) ^ set(self._names))
            raise ValueError(
                f"EMA state: expected the module's {len(self._names)} parameters, differs in {odd[:5]}"
            )
        if not average:
            self._average = []
            return
        self._average = [p.detach().to("cpu" if self._on_cpu else p.device).clone() for p in self._weights]
        for own, name in zip(self._average, self._names, strict=True):
            own.copy_(average[name])
