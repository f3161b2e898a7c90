"""The one CSV that every run is appended to, and the rows that a pytest-benchmark file turns into."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from bench.race import percentiles

MACHINE = "machine"


@dataclass(frozen=True)
class Row:
    """One measured quantity of one entry at one size.

    p20, p50, p80: percentiles over rounds, in ``unit``. date: of the whole run (ISO 8601, UTC), which it
    names. Rows of kernel "machine" are the limits that were measured in the same run.
    """

    kernel: str
    provider: str
    mode: str
    metric: str
    size: str
    p20: float
    p50: float
    p80: float
    unit: str
    device: str
    threads: int
    date: str
    version: str
    commit: str


COLUMNS = tuple(field.name for field in fields(Row))


def rows_of(report: dict[str, Any]) -> list[Row]:
    """Rows of a pytest-benchmark JSON that ``pytest bench`` wrote.

    Raises ValueError for a file of something else, or without a benchmark.
    """
    machine = report.get("machine_info", {})
    if "device" not in machine or not report.get("benchmarks"):
        raise ValueError("json: expected a pytest-benchmark file written by `pytest bench`, got another")
    version = ", ".join(f"{name} {value}" for name, value in machine["versions"].items() if value)
    run = {
        "device": machine["device"],
        "threads": machine["threads"],
        "date": report["datetime"],
        "version": version,
        "commit": machine["commit_measured"],
    }
    rows: list[Row] = []
    peaks: dict[str, list[float]] = {}
    for benchmark in report["benchmarks"]:
        info = benchmark["extra_info"]
        what = {name: info[name] for name in ("kernel", "provider", "mode", "size")}
        rows += [Row(**what, **metric, **run) for metric in info["metrics"]]
        if "machine_peak" in info:
            peaks.setdefault(info["machine_peak"]["dtype"], []).append(info["machine_peak"]["gflops"])
    limits = [("register-only multiply-adds", dtype, "GFLOP/s", values) for dtype, values in peaks.items()]
    limits.append(("memory reads", "float32", "GB/s", [machine["read_bandwidth_gb_s"]]))
    for provider, mode, unit, values in limits:
        p20, p50, p80 = percentiles(values)
        rows.append(Row(MACHINE, provider, mode, "throughput", "", p20, p50, p80, unit, **run))
    return rows


def append(path: Path, rows: Iterable[Row]) -> None:
    """Add ``rows`` to the CSV at ``path``, which is made with its header if it does not exist."""
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
    """All rows of the CSV. Raises ValueError when its header is another."""
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path}: expected the columns {', '.join(COLUMNS)}, got {reader.fieldnames}")
        return [_row(values) for values in reader]


def newest(rows: Sequence[Row]) -> list[Row]:
    """The rows of every kernel's last run: a run may have measured some of them only."""
    last: dict[str, str] = {}
    for row in rows:
        last[row.kernel] = max(last.get(row.kernel, ""), row.date)
    return [row for row in rows if row.date == last[row.kernel]]


def _row(values: dict[str, Any]) -> Row:
    for name in ("p20", "p50", "p80"):
        values[name] = float(values[name])
    values["threads"] = int(values["threads"])
    return Row(**values)
