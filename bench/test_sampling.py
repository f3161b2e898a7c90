"""Whole guided images at batch 1 and 8 (minutes: the plain sampler takes one per image)."""

from bench.cases import Case
from bench.sampling import SUITE
from bench.suite import Entry, Record, Suite
from bench.suites import Plan

PLAN: Plan = {
    "tiny": [(SUITE, Case(2, 96, 32))],
    "quick": [(SUITE, Case(1, 512, 256))],
    "full": [(SUITE, Case(n, 16384, 1024)) for n in (1, 8)],
}


def test_sampling(suite: Suite, case: Case, entry: Entry, timed: Record) -> None:
    timed(suite, case, entry)
