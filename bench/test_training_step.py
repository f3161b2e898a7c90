"""A tokenizer's whole training step at 64 px, with both published sizes of codebook."""

from bench.cases import Case
from bench.suite import Entry, Record, Suite
from bench.suites import Plan
from bench.training_step import SUITE

PLAN: Plan = {
    "tiny": [(SUITE, Case(256, 160, 32))],
    "quick": [(SUITE, Case(1024, 16384, 256))],
    "full": [(SUITE, Case(1024, k, 256)) for k in (16384, 262144)],
}


def test_training_step(suite: Suite, case: Case, entry: Entry, timed: Record) -> None:
    timed(suite, case, entry)
