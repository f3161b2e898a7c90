"""Operators of the codebook and of a linear head over its codes, in memory that does not grow with N×K.

Each module states one operator's contract. ``native`` (C++), ``triton`` and ``composite`` (chunked PyTorch,
any device) offer the same schemas in the namespaces ``ibq_fast``, ``ibq_fast_triton`` and
``ibq_fast_composite`` of ``torch.ops``.
"""

from ibq_fast.ops.backends import (
    Backend,
    BackendStatus,
    available_backends,
    backend_report,
    set_backend,
)
from ibq_fast.ops.choice import choose_tokens
from ibq_fast.ops.cross_entropy import linear_cross_entropy
from ibq_fast.ops.entropy import EntropyResult, codebook_entropy
from ibq_fast.ops.generator_step import generator_step
from ibq_fast.ops.histogram import code_histogram
from ibq_fast.ops.index_backprop import IndexBackpropResult, index_backprop
from ibq_fast.ops.native import release_memory
from ibq_fast.ops.search import SearchResult, codebook_search
from ibq_fast.ops.select import SelectResult, straight_through_select
from ibq_fast.ops.skinny_linear import skinny_linear
from ibq_fast.ops.skipping import set_skip_tolerance, skip_tolerance

__all__ = [
    "Backend",
    "BackendStatus",
    "EntropyResult",
    "IndexBackpropResult",
    "SearchResult",
    "SelectResult",
    "available_backends",
    "backend_report",
    "choose_tokens",
    "code_histogram",
    "codebook_entropy",
    "codebook_search",
    "generator_step",
    "index_backprop",
    "linear_cross_entropy",
    "release_memory",
    "set_backend",
    "set_skip_tolerance",
    "skinny_linear",
    "skip_tolerance",
    "straight_through_select",
]
