"""Training: ``python -m ibq_fast.train tokenizer|generator --config …``, or :func:`train_tokenizer`,
:func:`train_generator` from Python."""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {
    "GeneratorRun": "ibq_fast.train.config",
    "OptimConfig": "ibq_fast.train.optimizer",
    "RunConfig": "ibq_fast.train.config",
    "ScheduleConfig": "ibq_fast.train.schedule",
    "TokenizerRun": "ibq_fast.train.config",
    "load_config": "ibq_fast.train.config",
    "read_metrics": "ibq_fast.train.metrics",
    "train_generator": "ibq_fast.train.generator",
    "train_tokenizer": "ibq_fast.train.tokenizer",
}

__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'ibq_fast.train' has no attribute {name!r}")
