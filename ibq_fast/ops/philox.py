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


def philox_4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int | Tensor, int | Tensor]
) -> tuple[Tensor, ...]:
    """Four words in [0, 2^32), as int64 tensors of the counters' common broadcast shape.

    ``counter``: four int64 tensors of 32-bit words that broadcast together; ``key``: two 32-bit words,
    numbers or tensors that broadcast with them. Parts of the counter that are the same for many outputs may
    stay small: each round works on the shapes its operands have, so the first rounds cost little.
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


def gumbel(
    seed: Tensor, image: Tensor, position: Tensor, num_codes: int, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Standard Gumbel noise [B, num_codes] of rows with these seeds, images and positions, each int64 [B].

    Seeds and images are in [0, 2^63), positions and ``num_codes`` below 2^32. The noise is -log(-log(1 - v)),
    v = (word + 1/2) / 2^32, computed in ``dtype``: float64, or float32 on devices without it, whose fine
    steps are near v = 0, the end that makes large noise and so decides an argmax.
    """
    groups = torch.arange((num_codes + 3) // 4, device=image.device)
    seed, image, position = seed.unsqueeze(-1), image.unsqueeze(-1), position.unsqueeze(-1)
    words = philox_4x32((groups, position, image & _WORD, image >> 32), (seed & _WORD, seed >> 32))
    uniform = torch.stack(words, dim=-1).flatten(-2)[..., :num_codes].to(dtype)
    uniform = uniform.add_(0.5).mul_(2.0**-32).clamp_(max=1 - 2.0 ** -(24 if dtype == torch.float32 else 33))
    return uniform.neg_().log1p_().neg_().log_().neg_()
