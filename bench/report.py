"""``python -m bench.report``: measure, append to the CSV, redraw plots and docs/benchmarks.md.

A full run is long (its largest sizes take minutes each); ``bench/results/results.csv`` and the page are made
of such runs. ``--quick`` and ``--sizes tiny`` do the same with less into ``build/bench/<sizes>/``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from bench import log, page, plots
from bench.machine import BUILD, ROOT
from bench.suites import LEVELS

COMMAND = "python -m bench.report"
PLOTS = "benchmarks"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.add_argument("--sizes", choices=LEVELS, default="full", help="how much is measured")
    parser.add_argument("--quick", action="store_const", const="quick", dest="sizes", help="--sizes quick")
    parser.add_argument(
        "--json", type=Path, help="take this pytest-benchmark file instead of measuring; it is appended"
    )
    parser.add_argument("--redraw", action="store_true", help="only write the page again, from the CSV")
    parser.add_argument("--csv", type=Path, help="default: bench/results/results.csv")
    parser.add_argument("--docs", type=Path, help="folder of benchmarks.md; default: docs/")
    options = parser.parse_args(arguments)
    full = options.sizes == "full"
    table = options.csv or (ROOT / "bench" / "results" if full else BUILD / options.sizes) / "results.csv"
    docs = options.docs or (ROOT / "docs" if full else BUILD / options.sizes)
    if not options.redraw:
        measured = options.json or _measure(options.sizes)
        log.append(table, log.rows_of(json.loads(measured.read_text())))
    publish(table, docs)
    print(f"bench: {table} and {docs / 'benchmarks.md'} are up to date")


def publish(table: Path, docs: Path) -> None:
    """Write ``docs``/benchmarks.md and its plots from the newest run in ``table``."""
    rows = log.newest(log.read(table))
    drawn = plots.draw(rows, docs / PLOTS)
    page.write(rows, drawn, docs / "benchmarks.md", PLOTS, COMMAND)


def _measure(sizes: str) -> Path:
    """Run the suites; the file they wrote. A failed check ends the program: nothing wrong is published."""
    result = BUILD / f"{sizes}.json"
    result.parent.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "bench",
        "-q",
        f"--sizes={sizes}",
        f"--benchmark-json={result}",
    ]
    done = subprocess.run([*command, "--benchmark-columns=median,rounds"], cwd=ROOT, check=False)
    if done.returncode:
        raise SystemExit(f"bench: `{' '.join(command[2:])}` failed; nothing was recorded")
    return result


if __name__ == "__main__":
    main()
