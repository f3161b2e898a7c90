"""Counter-based random numbers: noise as a pure function of who asks for it.

Philox-4x32-10 (Salmon, Moraes, Dror, Shaw: Parallel random numbers, as easy as 1, 2, 3; SC 2011) turns a
128-bit counter and a 64-bit key into four 32-bit words. The sampler's noise uses

    key = (seed mod 2^32, seed >> 32)
    counter = (code // 4, position, image mod 2^32, image >> 32), word = code mod 4,

so the number of a code at a position of an image never depends on the batch, the order or the device.
Everything is int64 tensor arithmetic that wraps modulo 2^64, exact on every backend.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_WORD = 0xFFFFFFFF
_ROUNDS = 10


def philox_4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Four words in [0, 2^32), as int64 tensors of the counters' common broadcast shape.

    ``counter``: four int64 tensors of 32-bit words that broadcast together; ``key``: two 32-bit words.
    Parts of the counter that are the same for many outputs may stay small: each round works on the shapes its
    operands have, so the first rounds cost little.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # c1 and c3 keep stray high bits (they are only ever XORed, then masked); c0 and c2 are true words.
        product_0, product_1 = c0 * _MULTIPLIER_0, c2 * _MULTIPLIER_1
        c0, c1, c2, c3 = (
            ((product_1 >> 32) ^ (c1 ^ k0)) & _WORD,
            product_1,
            ((product_0 >> 32) ^ (c3 ^ k1)) & _WORD,
            product_0,
        )
        k0, k1 = (k0 + _WEYL_0) & _WORD, (k1 + _WEYL_1) & _WORD
    return c0, c1 & _WORD, c2, c3 & _WORD


def gumbel(seed: int, image_ids: Tensor, position: int, num_codes: int) -> Tensor:
    """Standard Gumbel noise float32 [B, num_codes] of ``image_ids`` int64 [B] at one position.

    ``seed`` and image ids are in [0, 2^63), ``position`` and ``num_codes`` below 2^32. The noise is
    -log(-log(1 - v)), v = (word + 1/2) / 2^32: float32 has its fine steps near v = 0, the end that makes
    large noise and so decides an argmax.
    """
    device = image_ids.device
    groups = torch.arange((num_codes + 3) // 4, device=device)
    image = image_ids.unsqueeze(-1)
    counter = (groups, torch.full_like(image, position), image & _WORD, image >> 32)
    words = philox_4x32(counter, (seed & _WORD, seed >> 32))
    uniform = torch.stack(words, dim=-1).flatten(-2)[..., :num_codes].to(torch.float32)
    uniform = uniform.add_(0.5).mul_(2.0**-32).clamp_(max=1 - 2.0**-24)
    return uniform.neg_().log1p_().neg_().log_().neg_()
