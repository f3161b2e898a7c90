"""ibq_fast: train, sample and measure image tokenizers with huge codebooks.

Public names are imported on first use, so that ``import ibq_fast`` stays quick. Only where torch-npu is
installed is PyTorch imported at once (:mod:`ibq_fast.npu` says why).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ibq_fast import npu

__version__ = "0.1.0"

_PUBLIC = {
    "IndexBackpropQuantizer": "ibq_fast.quantizer",
    "VectorQuantizer": "ibq_fast.quantizer",
    "QuantizerConfig": "ibq_fast.quantizer",
    "QuantizerOutput": "ibq_fast.quantizer",
    "Tokenizer": "ibq_fast.tokenizer",
    "TokenizerConfig": "ibq_fast.tokenizer",
    "Generator": "ibq_fast.generator",
    "GeneratorConfig": "ibq_fast.generator",
    "set_backend": "ibq_fast.ops",
}

__all__ = [
    "Generator",
    "GeneratorConfig",
    "IndexBackpropQuantizer",
    "QuantizerConfig",
    "QuantizerOutput",
    "Tokenizer",
    "TokenizerConfig",
    "VectorQuantizer",
    "__version__",
    "set_backend",
]

if TYPE_CHECKING:
    from ibq_fast.generator import Generator, GeneratorConfig
    from ibq_fast.ops import set_backend
    from ibq_fast.quantizer import IndexBackpropQuantizer, QuantizerConfig, QuantizerOutput, VectorQuantizer
    from ibq_fast.tokenizer import Tokenizer, TokenizerConfig


npu.load()


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'ibq_fast' has no attribute {name!r}")
