"""Quantizers of feature maps: index backpropagation (IBQ) and, as its baseline, plain vector quantization."""

from __future__ import annotations

from ibq_fast.quantizer.codebook import QuantizerOutput
from ibq_fast.quantizer.config import QuantizerConfig
from ibq_fast.quantizer.ibq import IndexBackpropQuantizer
from ibq_fast.quantizer.vq import VectorQuantizer

__all__ = [
    "IndexBackpropQuantizer",
    "QuantizerConfig",
    "QuantizerOutput",
    "VectorQuantizer",
    "build_quantizer",
]


def build_quantizer(config: QuantizerConfig) -> IndexBackpropQuantizer | VectorQuantizer:
    """The quantizer that ``config`` describes."""
    if config.kind == "vq":
        return VectorQuantizer(
            codebook_size=config.codebook_size,
            dim=config.dim,
            commitment_weight=config.commitment_weight,
            init=config.init,
            init_batches=config.init_batches,
        )
    fields = {name: getattr(config, name) for name in config.__dataclass_fields__ if name != "kind"}
    return IndexBackpropQuantizer(**fields)
