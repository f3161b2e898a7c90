"""``python -m bench.gpu --group NAME``: measure a group (groups.py), figure by figure into a CSV."""

from __future__ import annotations

import argparse
import datetime
from pathlib import Path
from typing import Any

import torch

from bench.cases import Case
from bench.gpu import facts, table
from bench.gpu.clock import Clock
from bench.gpu.groups import CHUNKED, DTYPE, Group, Implementation, groups
from bench.gpu.journal import Journal, leave_if_dead
from bench.gpu.table import CEILING
from bench.machine import ROOT, available_bytes
from bench.race import percentiles
from bench.suite import OURS, Entry

CSV = ROOT / "bench" / "results" / "gpu.csv"
# Seconds of one implementation at one size before it is taken to hang; more where it is compiled on the way.
LONGEST_STEP, LONGEST_COMPILED = 12.0, 30.0
READY = (f"{OURS} native", CHUNKED, CEILING)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--group", required=True, choices=tuple(groups(tiny=True)))
    parser.add_argument("--compiled", action="store_true", help="the torch.compile peers, and only them")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu rehearses, tiny")
    parser.add_argument("--csv", type=Path, default=CSV)
    parser.add_argument("--date", help="of the run, ISO 8601 (default: now)")
    parser.add_argument("--seconds", type=float, default=1.5, help="for each implementation at each size")
    parser.add_argument("--journal", type=Path, help="write down what is measured, and go on behind what was")
    options = parser.parse_args(arguments)
    date = options.date or datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    run = Run(options.device, options.csv, date, options.seconds, Journal(options.journal))
    run.group(groups(tiny=options.device == "cpu")[options.group], options.compiled)


class Run:
    """One run's clock, facts and CSV. journal: what an earlier process of the run measured is left out."""

    def __init__(self, device: str, csv: Path, date: str, seconds: float, journal: Journal) -> None:
        self.device, self.csv, self.date, self.seconds = device, csv, date, seconds
        self.journal = journal
        self.clock = Clock(device)
        self.facts = facts.gather(device)

    def group(self, group: Group, compiled: bool) -> None:
        """Measure every implementation at every case; what fails is recorded with its reason."""
        if not compiled and not self.journal.ended:
            self.square(group.name)
        for case in group.cases:
            problem = group.problem(case, self.device)
            for implementation in group.implementations(self.device):
                step = f"{implementation.provider}, {case.size} {case.regime}"
                if step in self.journal.ended:
                    continue
                if step in self.journal.lost:
                    refusal: str | None = "its process ended in it, or was ended after its limit"
                else:
                    refusal = implementation.refusal(case, self.free(), compiled)
                if refusal is None:
                    longest = LONGEST_STEP if implementation.provider in READY else LONGEST_COMPILED
                    with self.journal.step(step, longest):
                        refusal = self.one(group, case, problem, implementation)
                if refusal:
                    why = [("not measured", (0.0, 0.0, 0.0), refusal)]
                    self.write(group.name, implementation.provider, case, why)
                self.journal.end(step, "failed" if refusal else "passed")
                leave_if_dead(self.device)
        self.journal.finish()

    def one(self, group: Group, case: Case, problem: Any, implementation: Implementation) -> str | None:
        """Check, weigh, time and record one implementation; why it could not be, or None."""
        ours = implementation.provider == CHUNKED or implementation.provider.startswith(OURS)
        judged_as = OURS if ours else implementation.provider
        entry: Entry[Any] = Entry(judged_as, "bfloat16", implementation.prepare, dtype="bfloat16")
        try:
            call = implementation.prepare(problem)
            result = call()
            if implementation.check:
                group.verify(problem, entry, result)
            if group.images:
                extra, samples = None, [self.clock.once(call)]
            else:
                call()
                extra = self.clock.extra_bytes(call)
                samples = self.clock.race({"it": call}, self.seconds)["it"]
        except AssertionError as error:
            return f"wrong: {error}"
        except Exception as error:  # a peer that runs out of memory must not take the others' figures with it
            return f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
        found = self.metrics(samples, group.flops(case), extra)
        if group.images:
            rates = [case.n / value for value in percentiles(samples)]
            found.append(("images", (rates[2], rates[1], rates[0]), "images/s"))
        self.write(group.name, implementation.provider, case, found)
        return None

    def square(self, group: str) -> None:
        """The rate of a large square product, the ceiling of everything measured after it."""
        side = 8192 if self.clock.cuda else 128
        a, b = (torch.randn(side, side, device=self.device).to(DTYPE) for _ in range(2))
        samples = self.clock.race({"it": lambda: a @ b}, 0.5)["it"]
        case = Case(side, side, side)
        self.write(group, table.SQUARE, case, self.metrics(samples, case.product, None))

    def metrics(
        self, samples: list[float], flops: float, extra: int | None
    ) -> list[tuple[str, tuple[float, float, float], str]]:
        low, middle, high = percentiles(samples)
        found = [
            ("time", (1e3 * low, 1e3 * middle, 1e3 * high), "ms"),
            ("throughput", (flops / high / 1e12, flops / middle / 1e12, flops / low / 1e12), "TFLOP/s"),
        ]
        if extra is not None:
            found.append(("extra memory", (extra / 1e6,) * 3, "MB"))
        return found

    def write(
        self,
        group: str,
        provider: str,
        case: Case,
        metrics: list[tuple[str, tuple[float, float, float], str]],
    ) -> None:
        named = {name: getattr(self.facts, name) for name in ("gpu", "driver", "version", "commit")}
        rows = [
            table.Row(
                group, provider, case.size, case.regime or "", metric, *values, unit, date=self.date, **named
            )
            for metric, values, unit in metrics
        ]
        table.append(self.csv, rows)
        for row in rows:
            print(
                f"{row.group} {row.size} {row.regime} {row.provider}: {row.metric} {row.p50:.4g} {row.unit}"
            )

    def free(self) -> int:
        """Bytes that can be allocated on the device."""
        if not self.clock.cuda:
            return available_bytes()
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]


if __name__ == "__main__":
    main()
