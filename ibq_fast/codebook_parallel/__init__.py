"""A codebook split over processes, for codebooks larger than a device.

Every process of a group holds some rows of the codebook; features, which differ from process to process, are
gathered, every process compares all of them with its own codes, and what belongs together is merged.
"""

from ibq_fast.codebook_parallel.collected import CollectedRows, collect
from ibq_fast.codebook_parallel.shards import CodebookShards
from ibq_fast.codebook_parallel.step import (
    ParallelResult,
    parallel_decode,
    parallel_index_backprop,
    parallel_search,
)

__all__ = [
    "CodebookShards",
    "CollectedRows",
    "ParallelResult",
    "collect",
    "parallel_decode",
    "parallel_index_backprop",
    "parallel_search",
]
