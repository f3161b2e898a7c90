"""Plain vector quantization, the baseline."""

from __future__ import annotations

import torch
from torch import Tensor

from ibq_fast.ops import codebook_search
from ibq_fast.quantizer.codebook import (
    CodebookQuantizer,
    QuantizerOutput,
    full_precision,
    mean_square,
    no_entropies,
    norm_bias,
    restore,
)
from ibq_fast.quantizer.config import Init, QuantizerConfig


class VectorQuantizer(CodebookQuantizer):
    """Plain vector quantization, the baseline: nearest code, straight-through copy of the gradient.

    ``quantization_loss`` is mean((e - sg[z])²) + β mean((sg[e] - z)²); only selected codes receive gradient.
    The entropies are zeros. Arguments as in :class:`QuantizerConfig`.
    """

    def __init__(
        self,
        *,
        codebook_size: int = 16384,
        dim: int = 256,
        commitment_weight: float = 0.25,
        init: Init = "normal",
        init_batches: int = 1,
    ) -> None:
        super().__init__(
            QuantizerConfig(
                kind="vq",
                codebook_size=codebook_size,
                dim=dim,
                commitment_weight=commitment_weight,
                sample_entropy_weight=0.0,
                codebook_entropy_weight=0.0,
                similarity="euclidean",
                init=init,
                init_batches=init_batches,
            )
        )

    def forward(self, z: Tensor, channel_last: bool = False) -> QuantizerOutput:
        """Quantize ``z``; shapes and errors as in :meth:`IndexBackpropQuantizer.forward`."""
        rows, shape = self._rows(z, channel_last)
        self._first_features(rows)
        rows, codebook = self._widen(rows)
        with full_precision(z):
            with torch.no_grad():
                vectors, table, scale, norm_weight = self._operands(rows, codebook)
                bias = norm_bias(table, norm_weight)
                indices = codebook_search(vectors, table, scale=scale, bias=bias, exact=True).indices
            codes = self._codes(codebook, indices)
            z_q = rows + (codes - rows).detach()
            beta = self.config.commitment_weight
            loss = mean_square(codes, rows.detach()) + beta * mean_square(codes.detach(), rows)
        return QuantizerOutput(
            restore(z_q, shape, channel_last), indices.view(shape), loss, *no_entropies(rows)
        )

    def _operands(self, rows: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, float, float]:
        return rows, codebook, 2.0, 1.0
