"""Peak extra memory of one call: the largest training steps, and how it grows with K."""

from bench import cross_entropy, quantizer_step, search, training_step
from bench.cases import Case
from bench.suite import Entry, Record, Suite
from bench.suites import Plan

_STEP = ("ibq_fast float32", "eager float32", "chunked eager float32")


def _step(n: int, k: int, entries: tuple[str, ...] = _STEP) -> tuple:
    return quantizer_step.SUITE, Case(n, k, 256, "training-like", entries=entries)


PLAN: Plan = {
    "tiny": [_step(24, 160)],
    "quick": [_step(1024, 16384, ())],
    "full": [
        _step(1024, 262144, ("ibq_fast float32", "eager float32")),
        *[_step(1024, 1 << power) for power in (10, 12, 16)],
        _step(1024, 16384, ()),
        (search.SUITE, Case(1024, 262144, 256, entries=("ibq_fast float32", "matmul+argmax float32"))),
        (cross_entropy.SUITE, Case(1024, 16384, 1024)),
        *[(training_step.SUITE, Case(1024, k, 256)) for k in (16384, 262144)],
    ],
}


def test_memory(suite: Suite, case: Case, entry: Entry, weighed: Record) -> None:
    weighed(suite, case, entry)
