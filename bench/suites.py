"""The suites by kernel name, for processes that are given a name."""

from __future__ import annotations

from typing import Any

from bench import cross_entropy, quantizer_step, sampling, search, training_step
from bench.cases import Case
from bench.suite import Suite

SUITES: dict[str, Suite[Any]] = {
    suite.kernel: suite
    for suite in (
        search.SUITE,
        quantizer_step.SUITE,
        training_step.SUITE,
        cross_entropy.SUITE,
        sampling.SUITE,
    )
}

LEVELS = ("tiny", "quick", "full")

# What a test module runs at each level: pairs of suite and case.
Plan = dict[str, list[tuple[Suite[Any], Case]]]
