"""2-D rotary positions: half of a head's channel pairs turn with the row of a token, half with its column.

Channels (2i, 2i+1) of a head form pair i. With D channels there are D/2 pairs; pair i < D/4 turns by
``row * base^(-4i/D)``, pair D/4 + i by ``column * base^(-4i/D)``. The class token, at sequence position 0,
has no place in the grid: its query and key are multiplied by zero (not by the identity), so every token
attends to it with logit 0. That is how the published models were trained.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class RotaryTable(nn.Module):
    """Rotation factors by sequence position: ``table`` float32 [2, 1 + rows * columns, 1, head_dim].

    ``table[0]`` multiplies a head's channels, ``table[1]`` multiplies the channels with each pair swapped.
    The table stays float32 when the model changes its dtype: positions are rotated in float32.
    """

    table: Tensor

    def __init__(self, grid: tuple[int, int], head_dim: int, base: float) -> None:
        super().__init__()
        self.grid = grid
        self.head_dim = head_dim
        self.base = base
        self.register_buffer("table", self._build(None), persistent=False)

    def forward(self, start: int, stop: int) -> Tensor:
        """Factors of sequence positions start <= p < stop: [2, stop - start, 1, head_dim]."""
        return self.table[:, start:stop]

    def _build(self, device: torch.device | None) -> Tensor:
        rows, columns = self.grid
        quarter = self.head_dim // 4
        frequency = self.base ** (-torch.arange(quarter, dtype=torch.float32, device=device) / quarter)
        row = torch.outer(torch.arange(rows, dtype=torch.float32, device=device), frequency)
        column = torch.outer(torch.arange(columns, dtype=torch.float32, device=device), frequency)
        angle = torch.cat(
            (row[:, None].expand(-1, columns, -1), column[None].expand(rows, -1, -1)), dim=-1
        ).flatten(0, 1)
        cosine = angle.cos().repeat_interleave(2, dim=-1)
        sine = torch.stack((-angle.sin(), angle.sin()), dim=-1).flatten(-2)
        table = torch.stack((cosine, sine))
        return torch.cat((torch.zeros_like(table[:, :1]), table), dim=1).unsqueeze(2)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> RotaryTable:
        super()._apply(fn, recurse)
        self.table = self._build(self.table.device)
        return self
