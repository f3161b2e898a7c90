"""What a benchmark is made of: a problem, the entries that solve it, and the rule that checks them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from bench.cases import Case

Problem = TypeVar("Problem")

OURS = "ibq_fast"

# A peer is checked for being the same computation, not for its rounding.
OURS_FACTOR, PEER_FACTOR = 2.0, 64.0

# Roundings of the output's dtype that none avoids: upstream gradient, outputs, their sums.
ROUNDINGS = 4


@dataclass(frozen=True)
class Entry(Generic[Problem]):
    """One implementation in one mode.

    prepare: from the problem, the call that is timed (what it needs beforehand is done in ``prepare``).
    dtype: the arithmetic whose peak it is held against. nxk: how many float32 N×K tensors it holds at its
    peak, to leave it out where they do not fit. compiles: its first call at a size is a long one. missing:
    why it cannot run in this installation, or None. serves: the sizes at which it is worth running.
    """

    provider: str
    mode: str
    prepare: Callable[[Problem], Callable[[], Any]]
    dtype: str = "float32"
    nxk: float = 0.0
    compiles: bool = False
    missing: str | None = None
    serves: Callable[[Case], bool] = field(default=lambda case: True)

    @property
    def name(self) -> str:
        return f"{self.provider} {self.mode}"


@dataclass(frozen=True)
class Metric:
    """A figure beside time, a value per sample."""

    name: str
    values: list[float]
    unit: str


def no_metrics(case: Case, entry: Entry[Any], seconds: list[float]) -> list[Metric]:
    """Of a suite whose figures are time and throughput."""
    return []


@dataclass(frozen=True)
class Suite(Generic[Problem]):
    """A kernel with its entries.

    problem: inputs of a case. flops: nominal operations of a case (see each suite). check: raises
    AssertionError when an entry's result is wrong. metrics: further figures, from an entry's samples.
    """

    kernel: str
    problem: Callable[[Case], Problem]
    flops: Callable[[Case], float]
    check: Callable[[Problem, Entry[Problem], Any], None]
    entries: tuple[Entry[Problem], ...]
    metrics: Callable[[Case, Entry[Problem], list[float]], list[Metric]] = no_metrics

    def entries_for(self, case: Case, available_bytes: int) -> tuple[list[Entry[Problem]], dict[str, str]]:
        """Entries that run at ``case``, and the reasons why others do not."""
        names = {entry.name for entry in self.entries}
        unknown = set(case.entries) - names
        if unknown:
            raise ValueError(f"entries: expected some of {sorted(names)}, got {sorted(unknown)}")
        running, left_out = [], {}
        for entry in self.entries:
            if (case.entries and entry.name not in case.entries) or not entry.serves(case):
                continue
            needed = 4.0 * case.n * case.k * entry.nxk
            if entry.missing is not None:
                left_out[entry.name] = entry.missing
            elif needed > 0.8 * available_bytes:
                left_out[entry.name] = (
                    f"needs {needed / 1e9:.0f} GB, {available_bytes / 1e9:.0f} GB are available"
                )
            else:
                running.append(entry)
        return running, left_out


# What the fixtures `timed` and `weighed` are: measure an entry of a suite at a case, and record it.
Record = Callable[[Suite[Any], Case, Entry[Any]], None]


def judge(
    entry: Entry[Any],
    results: Mapping[str, Tensor],
    truth: Mapping[str, Tensor],
    plain: Mapping[str, Tensor],
    floors: Mapping[str, float],
) -> None:
    """The error-ratio rule: a result is as near the float64 truth as a plain float32 evaluation, times a
    factor, plus the roundings of the entry's dtype. ``floors`` adds, by name, to the error of the plain
    evaluation, where that may be small by luck. Norms are Frobenius norms. Raises AssertionError.
    """
    factor = OURS_FACTOR if entry.provider == OURS else PEER_FACTOR
    eps = torch.finfo(getattr(torch, entry.dtype)).eps
    for name, exact in truth.items():
        got = results[name].double()
        assert got.shape == exact.shape, f"{entry.name}: {name}: {list(got.shape)}, not {list(exact.shape)}"
        error = (got - exact).norm().item()
        yardstick = (plain[name].double() - exact).norm().item() + floors.get(name, 0.0)
        allowed = factor * yardstick + ROUNDINGS * eps * exact.norm().item()
        assert error <= allowed, f"{entry.name}: {name}: error {error:.3e}, allowed {allowed:.3e}"
