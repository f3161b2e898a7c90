"""What tests of several parts share: the golden files and the rule by which arithmetic is judged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"
GPU = Path(__file__).parent / "gpu"


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave tests/gpu out unless it is named: on a machine without a GPU its tests say nothing."""
    named = any(GPU in (path := Path(word.split("::")[0]).resolve(), *path.parents) for word in config.args)
    return True if collection_path == GPU and not named else None


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Any]:
    """Loads ``tests/golden/<name>``."""
    return lambda name: torch.load(GOLDEN / name, weights_only=True)


@pytest.fixture(scope="session")
def error_ratio() -> Callable[..., None]:
    """Asserts |ours - truth| <= 2 |eager - truth| + floor in the maximum norm.

    ``truth`` is float64's result, ``eager`` plain PyTorch's in the dtype of ours. The floor is the spacing of
    that dtype at the largest truth unless a bound by rounding analysis is given.
    """

    def check(name: str, ours: Tensor, eager: Tensor, truth: Tensor, floor: float | None = None) -> None:
        assert ours.shape == truth.shape, f"{name}: {tuple(ours.shape)} instead of {tuple(truth.shape)}"
        if truth.numel() == 0:
            return
        exact = truth.double()
        if floor is None:
            floor = torch.finfo(ours.dtype).eps * exact.abs().max().item()
        error = (ours.double() - exact).abs().max().item()
        allowed = 2 * (eager.double() - exact).abs().max().item() + floor
        assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e} (floor {floor:.3e})"

    return check
