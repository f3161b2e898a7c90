"""A run's rows, found by what they are about: the page and the plots both look them up here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bench.cases import REGIMES
from bench.log import Row
from bench.suite import OURS


@dataclass(frozen=True)
class Sizes:
    """N, K, D of a row's size."""

    n: int
    k: int
    d: int

    @staticmethod
    def of(size: str) -> Sizes:
        values = dict(part.split("=") for part in size.split())
        return Sizes(int(values["N"]), int(values["K"]), int(values["D"]))


def regime(row: Row) -> str:
    """The regime that the row's mode ends with, or ""."""
    last = row.mode.rsplit(" ", 1)[-1]
    return last if last in REGIMES else ""


def plain_mode(row: Row) -> str:
    """The row's mode without its regime."""
    return row.mode.removesuffix(regime(row)).rstrip()


@dataclass(frozen=True)
class Group:
    """What was measured together: one kernel, size and regime."""

    kernel: str
    size: str
    regime: str


def groups(rows: Sequence[Row], metric: str) -> dict[Group, list[Row]]:
    """Rows of ``metric`` by group, in the order of the run."""
    found: dict[Group, list[Row]] = {}
    for row in rows:
        if row.metric == metric and row.size:
            found.setdefault(Group(row.kernel, row.size, regime(row)), []).append(row)
    return found


def ours(rows: Sequence[Row], mode: str) -> Row | None:
    """Our row in ``mode`` (without regime) among the rows of a group."""
    return next((row for row in rows if row.provider == OURS and plain_mode(row) == mode), None)


def curve(rows: Sequence[Row], kernel: str, metric: str, **fixed: int) -> dict[str, list[tuple[Sizes, Row]]]:
    """float32 rows of a kernel by provider, at the sizes where ``fixed`` (n=, k=, d=) holds."""
    found: dict[str, list[tuple[Sizes, Row]]] = {}
    for row in rows:
        if row.kernel != kernel or row.metric != metric or plain_mode(row) != "float32":
            continue
        sizes = Sizes.of(row.size)
        if regime(row) in ("", "training-like") and all(
            getattr(sizes, key) == value for key, value in fixed.items()
        ):
            found.setdefault(row.provider, []).append((sizes, row))
    return found
