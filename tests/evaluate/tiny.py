"""A tokenizer that was never trained, the same whenever it is made."""

from __future__ import annotations

import torch

from ibq_fast.quantizer import QuantizerConfig
from ibq_fast.tokenizer import Tokenizer, TokenizerConfig


def tiny_tokenizer() -> Tokenizer:
    torch.manual_seed(0)
    quantizer = QuantizerConfig(codebook_size=16, dim=8)
    config = TokenizerConfig(
        resolution=16,
        base_channels=32,
        channel_multipliers=(1, 1),
        num_res_blocks=1,
        attention_resolutions=(),
        latent_channels=32,
        quantizer=quantizer,
    )
    return Tokenizer(config).eval().requires_grad_(False)
