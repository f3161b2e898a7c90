"""The CSV of GPU figures: rows, appending, reading, and the short table of a run."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

# The bare product of a case's operands, and a square one: the larger rate of a run is its ceiling. With a
# depth of 256 the former is held up by writing its result.
CEILING, SQUARE = "matmul", "square matmul"


@dataclass(frozen=True)
class Row:
    """One figure of one implementation at one size.

    group: search, step, cross_entropy or decode. provider: ibq_fast and its backend, or a peer. regime: of
    the logits, or "". metric: "time" (ms; p20, p50, p80 over rounds), "throughput" (TFLOP/s of the dense
    operations), "extra memory" (MB), "images" (a second), or "not measured", whose reason stands in
    ``unit``. date: of the run.
    """

    group: str
    provider: str
    size: str
    regime: str
    metric: str
    p20: float
    p50: float
    p80: float
    unit: str
    gpu: str
    driver: str
    date: str
    version: str
    commit: str


COLUMNS = tuple(field.name for field in fields(Row))


def append(path: Path, rows: Iterable[Row]) -> None:
    """Add ``rows`` to the CSV at ``path``, which is made with its header where it does not exist."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if fresh:
            writer.writeheader()
        for row in rows:
            values = asdict(row)
            values.update({name: f"{values[name]:.6g}" for name in ("p20", "p50", "p80")})
            writer.writerow(values)


def read(path: Path) -> list[Row]:
    """All rows; none without a file. Raises ValueError when the header is another."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path}: expected the columns {', '.join(COLUMNS)}, got {reader.fieldnames}")
        return [
            Row(**{name: float(v) if name in ("p20", "p50", "p80") else v for name, v in row.items()})
            for row in reader
        ]


def table(rows: Sequence[Row]) -> list[str]:
    """A short table: a line for each implementation, with its share of the bare product's rate."""
    rates = [r.p50 for r in rows if r.metric == "throughput" and r.provider in (CEILING, SQUARE)]
    ceiling = max(rates, default=0.0)
    lines = [f"{'':50} {'ms':>9} {'TFLOP/s':>8} {'of matmul':>9} {'extra MB':>9}"]
    cases = dict.fromkeys((r.group, r.size, r.regime) for r in rows)
    for group, size, regime in cases:
        lines.append(f"{group}  {size}  {regime}".rstrip())
        here = [r for r in rows if (r.group, r.size, r.regime) == (group, size, regime)]
        for provider in dict.fromkeys(r.provider for r in here):
            found = {r.metric: r for r in here if r.provider == provider}
            if "time" not in found:
                reason = found["not measured"].unit if "not measured" in found else "no figure"
                lines.append(f"  {provider:48} {reason}")
                continue
            rate = found["throughput"].p50
            share = f"{rate / ceiling:9.0%}" if ceiling else f"{'':9}"
            memory = f"{found['extra memory'].p50:9.0f}" if "extra memory" in found else f"{'':9}"
            images = f"  {found['images'].p50:.3g} images/s" if "images" in found else ""
            lines.append(f"  {provider:48} {found['time'].p50:9.3f} {rate:8.1f} {share} {memory}{images}")
    return lines
