"""Operators and truths for the tests that run under the interpreter."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from ibq_fast.ops.triton import plan


@pytest.fixture
def ops() -> SimpleNamespace:
    """The Triton operators by name."""
    return torch.ops.ibq_fast_triton


@pytest.fixture
def held_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of up to 256 dimensions are held at once, as they are on a GPU in half precision."""

    def entry(architecture: str, kernel: str, width: int, wide: bool) -> plan.Tile:
        return plan.Tile(rows=16, codes=32, depth=256, out=256, warps=1, stages=1)

    monkeypatch.setattr(plan, "entry", entry)
