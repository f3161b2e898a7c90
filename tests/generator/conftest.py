"""A small generator with a head that says something, and the published model of the goldens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ibq_fast.generator import Generator, GeneratorConfig

CHECKPOINT = Path(__file__).parent.parent / "golden" / "generator.ckpt"


@pytest.fixture(scope="session")
def reference(golden: Callable[[str], Any]) -> dict[str, Any]:
    """What the published implementation computed."""
    return golden("generator_adaln.pt")


@pytest.fixture
def published() -> Generator:
    """Its checkpoint."""
    return Generator.from_pretrained(CHECKPOINT, num_heads=4, grid=4)


@pytest.fixture(scope="session")
def make_generator() -> Callable[..., Generator]:
    """Builds small models: random weights, open gates, logits of order one, so that every part shows."""

    def make(**settings: Any) -> Generator:
        torch.manual_seed(1)
        small = {"vocab_size": 50, "num_classes": 5, "grid": (3, 4), "depth": 2, "num_heads": 4, "width": 32}
        model = Generator(GeneratorConfig(**(small | {"gate_bias": 0.5, "init_std": 0.1} | settings)))
        torch.nn.init.normal_(model.head.weight, std=0.5)
        return model.eval()

    return make
