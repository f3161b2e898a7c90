"""Cost against K (2^10 to 2^20, one image) and against N (K = 16,384): ours beside the fastest plain way.

Sizes that another module times are left out here; the plots take them from there.
"""

from bench import quantizer_step, search
from bench.cases import Case
from bench.suite import Entry, Record, Suite
from bench.suites import Plan

_SEARCH = ("ibq_fast float32", "matmul+argmax float32")
_STEP = ("ibq_fast float32", "eager float32")
# Eager's N×K tensors at one image fill the time of a run before they fill the memory.
_STEP_ALONE = ("ibq_fast float32",)


def _search(n: int, k: int) -> tuple:
    return search.SUITE, Case(n, k, 256, entries=_SEARCH)


def _step(n: int, k: int, entries: tuple[str, ...] = _STEP) -> tuple:
    return quantizer_step.SUITE, Case(n, k, 256, "training-like", entries=entries)


PLAN: Plan = {
    "tiny": [_search(8, 128), _step(8, 128)],
    "quick": [
        *[_search(256, 1 << power) for power in (10, 12, 14, 16)],
        *[_step(256, 1 << power) for power in (10, 12, 14)],
    ],
    "full": [
        *[_search(256, 1 << power) for power in (10, 12, 14, 16, 18, 20)],
        *[_search(n, 16384) for n in (16, 64, 4096)],
        *[_step(256, 1 << power) for power in (10, 12, 14, 16)],
        _step(256, 1 << 20, _STEP_ALONE),
        *[_step(n, 16384) for n in (16, 64)],
        _step(4096, 16384, _STEP_ALONE),
    ],
}


def test_scaling(suite: Suite, case: Case, entry: Entry, timed: Record) -> None:
    timed(suite, case, entry)
