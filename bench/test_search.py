"""Search: large batches, one image, narrow codes; float32, bfloat16, Euclidean, with log-sum-exp, exact."""

from bench.cases import Case
from bench.search import SUITE
from bench.suite import Entry, Record, Suite
from bench.suites import Plan

PLAN: Plan = {
    "tiny": [(SUITE, Case(32, 96, 16)), (SUITE, Case(16, 64, 256))],
    "quick": [(SUITE, Case(1024, 16384, 256)), (SUITE, Case(256, 16384, 32))],
    "full": [
        *[(SUITE, Case(1024, k, 256)) for k in (16384, 262144)],
        *[(SUITE, Case(256, 16384, d)) for d in (8, 32, 64)],
    ],
}


def test_search(suite: Suite, case: Case, entry: Entry, timed: Record) -> None:
    timed(suite, case, entry)
