"""Training step of the quantizer in the three regimes of its logits, float32 and bfloat16."""

from bench.cases import REGIMES, Case
from bench.quantizer_step import SUITE
from bench.suite import Entry, Record, Suite
from bench.suites import Plan

PLAN: Plan = {
    "tiny": [(SUITE, Case(24, 160, 32, regime)) for regime in REGIMES],
    "quick": [(SUITE, Case(1024, 16384, 256, regime)) for regime in REGIMES],
    "full": [
        (SUITE, Case(n, k, 256, regime)) for n, k in ((1024, 16384), (256, 262144)) for regime in REGIMES
    ],
}


def test_quantizer_step(suite: Suite, case: Case, entry: Entry, timed: Record) -> None:
    timed(suite, case, entry)
