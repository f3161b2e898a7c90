"""Stage one: images to a grid of code indices and back, with the losses that train it."""

from ibq_fast.tokenizer.autoencoder import Decoder, Encoder
from ibq_fast.tokenizer.config import TokenizerConfig
from ibq_fast.tokenizer.discriminator import PatchDiscriminator
from ibq_fast.tokenizer.losses import LossConfig, LossOutput, TokenizerLoss
from ibq_fast.tokenizer.model import Tokenizer, TokenizerOutput

__all__ = [
    "Decoder",
    "Encoder",
    "LossConfig",
    "LossOutput",
    "PatchDiscriminator",
    "Tokenizer",
    "TokenizerConfig",
    "TokenizerLoss",
    "TokenizerOutput",
]
