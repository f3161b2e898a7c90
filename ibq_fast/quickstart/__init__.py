"""The whole road once: ``python -m ibq_fast.quickstart`` trains a tokenizer, plain vector quantization under
the same budget, and a generator on real images, measures them and writes a report with pictures.

It composes what the package offers to everyone (:func:`ibq_fast.train.train_tokenizer`,
:func:`ibq_fast.train.train_generator`, ``from_pretrained``, ``sample``); only the small classifier that
judges the generated images is its own.
"""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {
    "Options": "ibq_fast.quickstart.options",
    "TARGETS": "ibq_fast.quickstart.targets",
    "run_quickstart": "ibq_fast.quickstart.pipeline",
}

__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'ibq_fast.quickstart' has no attribute {name!r}")
