"""Decoding one position at a time: what a call of the sampler prepares once, and the step it repeats.

Prepared once: every block's modulation (in the published base model that is 103 of 343 million parameters,
which depend on the class alone) and the cache. The step works on [rows, width] without a sequence dimension.

``ROW_GROUP``: BLAS libraries choose other kernels, with another order of summation, for a handful of rows,
also for what a thread's share leaves over. On an AMD EPYC with MKL (1 and 2 threads) each row of a product
has the same bits for 8, 16, 24, ... rows, and others for 1, 2, 3 or 9. So that an image does not depend on
the size of its batch, rows are padded to a multiple of 8. In float32 at 1024 x 3072 on one thread a product
of 8 rows takes 1.1 times as long as one of 2 and 0.8 times as long as one of 3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ibq_fast.generator.transformer import Modulation, modulated_norm

if TYPE_CHECKING:
    from ibq_fast.generator.generator import Generator

ROW_GROUP = 8


def round_up(rows: int, multiple: int) -> int:
    """The smallest multiple of ``multiple`` that is at least ``rows``."""
    return -(-rows // multiple) * multiple


class Decoder:
    """Decodes ``rows`` sequences in step, one per entry of ``class_ids`` int [rows]."""

    def __init__(self, model: Generator, class_ids: Tensor) -> None:
        self.model = model
        self.class_vectors = model.class_embedding(class_ids)
        block_condition, head_condition = model.condition(self.class_vectors)
        self.modulations = [
            Modulation(*(part.contiguous() for part in block.modulation(block_condition)))
            for block in model.layers()
        ]
        self.head_scale, self.head_shift = model.head_norm.modulation(head_condition)
        rows = class_ids.shape[0]
        self.layers = list(
            zip(model.layers(), self.modulations, model.kv_cache(rows).layers(rows), strict=True)
        )

    def step(self, x: Tensor, position: int) -> Tensor:
        """Input vectors x [rows, width] of sequence ``position`` (0: ``class_vectors``; p: token p - 1) ->
        hidden vectors [rows, width] whose product with the head predicts token ``position``."""
        factors = self.model.rotary(position, position + 1)
        for block, modulation, (keys, values) in self.layers:
            x = block.decode(x, modulation, factors, keys, values, position)
        return modulated_norm(x, self.head_scale, self.head_shift, self.model.head_norm.eps)
