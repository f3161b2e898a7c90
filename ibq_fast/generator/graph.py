"""Decoding on a GPU by CUDA graphs: a position's kernels are captured once and replayed, one launch for all.

A step of the published base model is some 500 kernels of a few microseconds each, which take longer to launch
one by one than to run. A graph's sizes and addresses are fixed, so that

- tokens and positions come through static buffers, and every row writes its own position of the cache;
- attention reads a prefix of the cache whose length is a multiple of ``BUCKET``, the least that holds all
  rows, under a mask: one graph for each such length (four at 256 positions), captured when first needed.

The blocks are those of the composite backend (``ibq_fast.ops.generator_step``). STATUS: never run on a GPU;
on other devices the same calls are made without a graph, which is how they are tested.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ibq_fast.ops import proof
from ibq_fast.ops.generator_step import NAME, through_blocks

if TYPE_CHECKING:
    from ibq_fast.generator.decoder import Decoder

BUCKET = 64
ENVIRONMENT_VARIABLE = "IBQ_FAST_DECODE_GRAPHS"
BACKEND = "graph"  # as committed results name it (``ibq_fast.ops.proof``)


def wanted(decoder: Decoder) -> bool:
    """Whether the decoder's steps are to be graphs: on a GPU whose architecture a committed result shows them
    right on, or where IBQ_FAST_DECODE_GRAPHS says ``on``; never where it says ``off``. ValueError for
    anything else in it."""
    said = os.environ.get(ENVIRONMENT_VARIABLE)
    if said not in (None, "", "on", "off"):
        raise ValueError(f"{ENVIRONMENT_VARIABLE}: expected on or off, got {said!r}")
    if said or decoder.device.type != "cuda":
        return said == "on" and decoder.device.type == "cuda"
    return proof.doubt(NAME, BACKEND, str(decoder.weights[0].dtype).removeprefix("torch.")) is None


@dataclass(frozen=True)
class _Captured:
    """Static buffers of one graph: tokens, positions int64 [m] in, hidden [m, width] out; and its replay."""

    tokens: Tensor
    positions: Tensor
    hidden: Tensor
    replay: Callable[[], None]


class GraphedSteps:
    """A decoder's inputs and step for a position, as graphs: called like both in turn, while it lives.

    Memory beside the decoder's: the activations of a step once, shared by all graphs.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = weakref.proxy(decoder)  # which owns this
        self._captured: dict[tuple[int, int], _Captured] = {}
        self._pool = torch.cuda.graph_pool_handle() if decoder.device.type == "cuda" else None
        decoder.cache.zero_()  # what a mask hides is multiplied by 0, and has to be finite

    @torch.no_grad()
    def __call__(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """tokens, positions int64 [m] as :meth:`Decoder.inputs` and :meth:`Decoder.step` take them, positions
        on the CPU -> hidden vectors [m, width]. ValueError for positions past the last."""
        total = self.decoder.cache.shape[4]
        longest = int(positions.max()) + 1 if positions.numel() else 0
        if longest > total:
            raise ValueError(f"positions: expected values below {total}, got {longest - 1}")
        length = min(total, max(1, -(-longest // BUCKET)) * BUCKET)
        key = positions.shape[0], length
        if key not in self._captured:
            self._captured[key] = self._capture(*key)
        held = self._captured[key]
        held.tokens.copy_(tokens, non_blocking=True)
        held.positions.copy_(positions, non_blocking=True)
        held.replay()
        return held.hidden.clone()

    def _capture(self, rows: int, length: int) -> _Captured:
        decoder = self.decoder
        tokens = torch.zeros(rows, dtype=torch.int64, device=decoder.device)
        positions = torch.full_like(tokens, -1)  # nobody takes part: warming up leaves the cache as it is
        hidden = decoder.modulation.new_zeros((rows, decoder.modulation.shape[2]))

        def call() -> None:
            hidden.copy_(self._step(decoder.inputs(tokens, positions), positions, length))

        return _Captured(tokens, positions, hidden, self._recorded(call))

    def _recorded(self, call: Callable[[], None]) -> Callable[[], None]:
        if self.decoder.device.type != "cuda":
            return call
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(2):  # libraries set themselves up, which a graph must not hold
                call()
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            call()
        return graph.replay

    def _step(self, x: Tensor, positions: Tensor, length: int) -> Tensor:
        """The step over the first ``length`` positions of the cache; no size or address depends on values."""
        decoder = self.decoder
        rows = x.shape[0]
        row = torch.arange(rows, device=x.device)
        idle = (positions < 0).view(rows, 1, 1)
        at = positions.clamp(min=0)
        valid = (torch.arange(length, device=x.device) <= at.unsqueeze(1)).view(rows, 1, 1, length)

        def attention(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            keys[row, :, at] = torch.where(idle, keys[row, :, at], k)
            values[row, :, at] = torch.where(idle, values[row, :, at], v)
            prefix = keys[:rows, :, :length], values[:rows, :, :length]
            return F.scaled_dot_product_attention(q, *prefix, attn_mask=valid)

        config = decoder.model.config
        hidden = through_blocks(
            x,
            decoder.model.rotary.table[:, at],
            attention,
            decoder.weights,
            decoder.scales,
            decoder.modulation,
            decoder.cache,
            config.num_heads,
            config.norm_eps,
        )
        return hidden.masked_fill(idle.view(rows, 1), 0.0)
