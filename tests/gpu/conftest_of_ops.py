"""Operands and rounding floors of tests/ops, for tests that are not below it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace


def _load() -> ModuleType:
    """tests/ops/conftest.py under a name of its own: "conftest" is taken."""
    path = Path(__file__).parents[1] / "ops" / "conftest.py"
    spec = importlib.util.spec_from_file_location("conftest_of_tests_ops", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look it up
    spec.loader.exec_module(module)
    return module


_module = _load()
make_operands = _module.make_operands
floors_of = SimpleNamespace(logits=_module.logit_floor, gradients=_module.gradient_floors)
