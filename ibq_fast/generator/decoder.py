"""Decoding one position at a time: what a sequence's class decides once, and the step that is repeated.

Prepared when a row is given a class: every block's modulation (in the published base model that is 103 of
343 million parameters, which depend on the class alone). Prepared once per model and precision: weights,
key-value cache and modulations, one block of memory each. The step is one operator,
``ibq_fast.ops.generator_step``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ibq_fast.generator import graph
from ibq_fast.generator.graph import GraphedSteps
from ibq_fast.ops.generator_step import MODULATION_ORDER, generator_step
from ibq_fast.ops.skinny_linear import quantize_rows, skinny_linear

if TYPE_CHECKING:
    from ibq_fast.generator.generator import Generator, TokenProjection

PRECISIONS = {
    "float32": torch.float32,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
    "int8": torch.int8,
}
"""Names of the weights' precisions while decoding; int8 has one scale per output channel."""


def precision_of(model: Generator, precision: str | None) -> str:
    """``precision``, or the one of the model's own dtype. ValueError when there is no such precision."""
    if precision is None:
        own = {dtype: name for name, dtype in PRECISIONS.items()}
        return own[model.head.weight.dtype]
    if precision not in PRECISIONS:
        raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}")
    return precision


class Decoder:
    """Up to ``rows`` sequences that advance one position a step, each at a position of its own.

    Hidden and input vectors are ``dtype``: float32, or float64 in that precision. Rows are slots: ``admit``
    gives a slot a class and a fresh sequence, whatever its neighbours are doing. Use
    :meth:`Generator.decoder`, which keeps one for the next call. ``backend`` as for every operator.

    Memory: per row 2 * depth * kv_heads * head_dim * positions elements of cache and (6 * depth + 2) *
    width of modulation; weights are the model's own where its dtype is the precision's, else a copy in that
    precision.
    """

    def __init__(
        self, model: Generator, rows: int, *, precision: str | None = None, backend: str | None = None
    ) -> None:
        if not isinstance(rows, int) or isinstance(rows, bool) or rows < 1:
            raise ValueError(f"rows: expected a positive integer, got {rows!r}")
        config = model.config
        self.model = model
        self.rows = rows
        self.precision = precision_of(model, precision)
        self.backend = backend
        self.dtype = torch.float64 if self.precision == "float64" else torch.float32
        self.device = model.head.weight.device
        self.weights, self.scales = self._prepared(
            [
                layer.weight
                for block in model.layers()
                for layer in (
                    block.attention.qkv,
                    block.attention.out,
                    block.mlp.gate_up,
                    block.mlp.down,
                )
            ]
        )
        heads, head_scale = self._prepared([model.head.weight])
        self.head, self.head_scale = heads[0], head_scale[0] if head_scale else None
        cached = self.dtype if self.precision == "int8" else PRECISIONS[self.precision]
        self.cache = torch.empty(
            (config.depth, 2, rows, config.kv_heads, config.num_tokens, config.head_dim),
            dtype=cached,
            device=self.device,
        )
        self.modulation = torch.zeros(
            (len(MODULATION_ORDER) * config.depth + 2, rows, config.width),
            dtype=self.dtype,
            device=self.device,
        )
        self.class_vectors = torch.zeros((rows, config.width), dtype=self.dtype, device=self.device)
        self.graphs = GraphedSteps(self) if graph.wanted(self) else None

    @torch.no_grad()
    def admit(self, slots: Tensor, class_ids: Tensor) -> None:
        """Give the rows ``slots`` int64 [m] the classes ``class_ids`` int64 [m]: their next position is 0.

        Other rows are not touched. Equal classes are computed once.
        """
        if slots.shape != class_ids.shape or slots.ndim != 1:
            raise ValueError(f"class_ids: expected [{slots.numel()}] as slots, got {list(class_ids.shape)}")
        model = self.model
        slots = slots.to(self.device)
        classes, which = class_ids.to(self.device).unique(return_inverse=True)
        vectors = model.class_embedding(classes).to(self.dtype)
        condition = F.silu(vectors)
        shared = self._linear(condition, model.shared_adaln) if model.config.shared_adaln else None
        parts: list[Tensor] = []
        for block in model.layers():
            mod = block.fold(self._linear(condition, block.adaln) if shared is None else shared)
            parts += [getattr(mod, name) for name in MODULATION_ORDER]
        parts += model.head_norm.fold(self._linear(condition, model.head_norm.adaln))
        self.modulation[:, slots] = torch.stack(parts).to(self.dtype)[:, which]
        self.class_vectors[slots] = vectors[which]

    @torch.no_grad()
    def embed(self, tokens: Tensor) -> Tensor:
        """Token indices int64 [m] -> their input vectors [m, width]."""
        embedded = self.model.token_embedding(tokens).to(self.dtype)
        if self.model.config.token_dim is None:
            return embedded
        projection = cast("TokenProjection", self.model.token_projection)
        expanded = F.gelu(self._linear(embedded, projection.expand), approximate="tanh")
        return self._linear(expanded, projection.out)

    def inputs(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """What row m feeds at ``positions[m]``: its class at 0, else ``tokens[m]`` (the token before; any
        valid index where the position is 0 or negative). int64 [m] each -> [m, width]."""
        embedded, first = self.embed(tokens), positions <= 0
        if first.is_cpu and not bool(first.any()):
            return embedded
        return torch.where(
            first.to(self.device).unsqueeze(1), self.class_vectors[: tokens.shape[0]], embedded
        )

    def advance(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """:meth:`inputs` and :meth:`step` in one; on a GPU a CUDA graph (``generator/graph.py``)."""
        if self.graphs is not None:
            return self.graphs(tokens, positions)
        return self.step(self.inputs(tokens, positions), positions)

    @torch.no_grad()
    def step(self, x: Tensor, positions: Tensor) -> Tensor:
        """Advance the first m rows: inputs x [m, width] of sequence ``positions`` int64 [m] (0: the class,
        p: token p - 1; negative: the row idles) -> hidden vectors [m, width] whose product with the head
        predicts token ``positions[m]``. Positions on the CPU spare an accelerator a wait."""
        config = self.model.config
        return generator_step(
            x,
            positions,
            self.weights,
            self.scales,
            self.modulation,
            self.cache,
            self.model.rotary.table,
            config.num_heads,
            config.norm_eps,
            backend=self.backend,
        )

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden vectors [r, width], any number of them -> logits [r, vocab_size], float32 (float64)."""
        return skinny_linear(hidden, self.head, self.head_scale, backend=self.backend)

    def _prepared(self, weights: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Weights in the decoder's precision, and scales where it has them."""
        if self.precision != "int8":
            return [weight.detach().to(PRECISIONS[self.precision]) for weight in weights], []
        quantized = [quantize_rows(weight.detach()) for weight in weights]
        return [weight for weight, _ in quantized], [scale for _, scale in quantized]

    def _linear(self, x: Tensor, layer: torch.nn.Linear) -> Tensor:
        """A layer that keeps the model's own precision."""
        weight = layer.weight.detach()
        if weight.dtype == torch.float64 or self.dtype == torch.float64:
            weight = weight.to(self.dtype)
        return skinny_linear(x, weight, None, layer.bias.detach().to(self.dtype), backend=self.backend)
