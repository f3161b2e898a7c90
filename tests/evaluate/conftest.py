"""What tests of evaluations share: torchvision beside a torch that it was not built for."""

from __future__ import annotations

import sys

import pytest
import torch

torch.set_num_threads(1)  # tiny tensors: threads would only wait for each other
_KEPT: list[torch.library.Library] = []


@pytest.fixture(scope="session")
def with_torchvision() -> None:
    """``torchvision`` can be imported: a build for another torch misses the schemas of two operators, which
    nothing here calls."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in [
            n for n in sys.modules if n.partition(".")[0] in ("torchvision", "lpips", "torch_fidelity")
        ]:
            del sys.modules[name]
        _KEPT.append(torch.library.Library("torchvision", "DEF"))
        for name in ("nms", "qnms"):
            _KEPT[-1].define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
