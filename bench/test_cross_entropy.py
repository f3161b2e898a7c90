"""The generator's loss over its vocabulary, forward and backward."""

from bench.cases import Case
from bench.cross_entropy import SUITE
from bench.suite import Entry, Record, Suite
from bench.suites import Plan

PLAN: Plan = {
    "tiny": [(SUITE, Case(32, 96, 16))],
    "quick": [(SUITE, Case(256, 16384, 1024))],
    "full": [(SUITE, Case(1024, k, 1024)) for k in (16384, 262144)],
}


def test_cross_entropy(suite: Suite, case: Case, entry: Entry, timed: Record) -> None:
    timed(suite, case, entry)
