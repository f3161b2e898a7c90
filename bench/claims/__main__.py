"""What the method is said to do, tried on small tokenizers.

    python -m bench.claims a                       utilisation and reconstruction as K grows
    python -m bench.claims b                       the same as D grows
    python -m bench.claims c                       the effect of each loss term
    python -m bench.claims d                       usage over training time
    python -m bench.claims a b c d --missing       what bench/results/claims.csv does not have yet
    python -m bench.claims --draw                  plots and tables from what was measured so far

A run's rows take the place of its earlier ones, so that a campaign can be made in parts (--limit, --method,
--codes, --dim). Plots share runs: a needs those of d, b and c need those of a. The other quantizers come from
vector-quantize-pytorch (the extra `bench`).
"""

from __future__ import annotations

import argparse
from datetime import date

import torch

from bench import machine
from bench.claims.cases import ALL, CLAIMS, Case, cases
from bench.claims.draw import draw
from bench.claims.results import keep, measured
from bench.claims.training import train


def measure(case: Case) -> None:
    """Make the run ``case`` and keep its rows."""
    budget = CLAIMS[case.claim].budget
    about = vars(case) | {
        "threads": torch.get_num_threads(),
        "machine": machine.device_name(),
        "commit": machine.commit(),
        "date": date.today().isoformat(),
    }
    keep([about | row for row in train(ALL[case.method], case.codes, case.dim, case.seed, budget)])


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="bench.claims", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("claims", nargs="*", metavar="claim", help="a, b, c, d (all without)")
    parser.add_argument("--missing", action="store_true", help="leave out what the CSV already has")
    parser.add_argument("--method", action="append", choices=ALL, help="this method (repeatable)")
    parser.add_argument("--codes", type=int, action="append", help="this codebook size (repeatable)")
    parser.add_argument("--dim", type=int, action="append", help="this code dimension (repeatable)")
    parser.add_argument("--limit", type=int, help="make at most so many runs")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--list", action="store_true", help="name the runs and stop")
    parser.add_argument("--draw", action="store_true", help="only draw from the CSV")
    parser.add_argument("--no-draw", action="store_true", help="leave plots and page as they are")
    chosen = parser.parse_args()
    for claim in chosen.claims:
        if claim not in CLAIMS:
            parser.error(f"claim: expected one of {', '.join(CLAIMS)}, got {claim!r}")
    if chosen.draw:
        draw()
        return
    have = measured() if chosen.missing else set()
    wanted = [
        case
        for claim in chosen.claims or CLAIMS
        for case in cases(claim)
        if case not in have
        and (not chosen.method or case.method in chosen.method)
        and (not chosen.codes or case.codes in chosen.codes)
        and (not chosen.dim or case.dim in chosen.dim)
    ]
    torch.set_num_threads(chosen.threads)
    for case in wanted[: chosen.limit]:
        print(f"{case.claim}: {case.method}, K = {case.codes}, D = {case.dim}, seed {case.seed}", flush=True)
        if not chosen.list:
            measure(case)
    made = 0 if chosen.list else len(wanted[: chosen.limit])
    if made and not chosen.no_draw:
        draw()
    print(f"{len(wanted) - made} runs left")


if __name__ == "__main__":
    main()
