"""What the quick start is expected to reach, and whether it did."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Target(NamedTuple):
    """``figure`` of the report must be at least ``least``."""

    figure: str
    title: str
    least: float
    unit: str


TARGETS = (
    Target("psnr", "reconstruction, PSNR", 21.0, "dB"),
    Target("utilisation", "codebook utilisation", 0.85, ""),
    Target("recognised", "generated images whose class is recognised", 0.70, ""),
)


def judge(figures: Mapping[str, float]) -> list[dict[str, object]]:
    """One entry per target: its name, what was reached, what was asked, ``met``."""
    return [
        {
            "figure": target.figure,
            "title": target.title,
            "reached": figures[target.figure],
            "at_least": target.least,
            "unit": target.unit,
            "met": figures[target.figure] >= target.least,
        }
        for target in TARGETS
    ]
