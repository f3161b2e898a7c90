"""Keys and values of the tokens sampled so far."""

from __future__ import annotations

import torch
from torch import Tensor

from ibq_fast.generator.config import GeneratorConfig


class KVCache:
    """One block of memory [depth, 2, rows, kv_heads, positions, head_dim], allocated once and overwritten.

    It is never cleared: a sampler reads only the prefix that it has written. Smaller batches use its first
    rows. Size in bytes: 2 * depth * rows * kv_heads * head_dim * (grid rows * columns) * element size.
    """

    def __init__(self, config: GeneratorConfig, rows: int, dtype: torch.dtype, device: torch.device) -> None:
        shape = (config.depth, 2, rows, config.kv_heads, config.num_tokens, config.head_dim)
        self.memory = torch.empty(shape, dtype=dtype, device=device)

    def fits(self, rows: int, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether ``rows`` sequences of this dtype and device go in."""
        memory = self.memory
        return rows <= memory.shape[2] and memory.dtype == dtype and memory.device == device

    def layers(self, rows: int) -> list[tuple[Tensor, Tensor]]:
        """Per layer, the keys and the values of the first ``rows``: [rows, kv_heads, positions, head_dim]."""
        return [(layer[0], layer[1]) for layer in self.memory[:, :, :rows].unbind(0)]
