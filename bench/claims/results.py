"""bench/results/claims.csv: one row for each evaluation of each run."""

from __future__ import annotations

import csv
import os
from typing import Any

from bench.claims.cases import Case
from bench.machine import ROOT

RESULTS = ROOT / "bench" / "results" / "claims.csv"
KEY = ("claim", "method", "codes", "dim", "seed")
COLUMNS = (
    *KEY, "step", "size", "psnr", "utilisation", "perplexity", "window_utilisation", "window_perplexity",
    "cpu_ms", "threads", "machine", "commit", "date",
)  # fmt: skip


def read() -> list[dict[str, str]]:
    """All rows, as written; none without a file."""
    if not RESULTS.exists():
        return []
    with RESULTS.open(newline="") as file:
        return list(csv.DictReader(file))


def measured() -> set[Case]:
    """The runs that have rows."""
    return {
        Case(row["claim"], row["method"], int(row["codes"]), int(row["dim"]), int(row["seed"]))
        for row in read()
    }


def keep(rows: list[dict[str, Any]]) -> None:
    """Put ``rows`` in the place of earlier ones of their runs."""
    done = {tuple(str(row[name]) for name in KEY) for row in rows}
    kept = [row for row in read() if tuple(row[name] for name in KEY) not in done]
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    temporary = RESULTS.with_suffix(".tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows([*kept, *rows])
    os.replace(temporary, RESULTS)
