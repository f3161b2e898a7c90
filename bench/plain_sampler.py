"""The sampler that the generator's decoding is measured against, written as the published code does it.

Both rows of a guided image go through everything: every block derives its modulation from the class at
every step, queries meet the keys of all positions under a mask, the head is applied to both rows and
guidance combines logits. The cache is allocated beforehand. Greedy.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ibq_fast.generator import Generator
from ibq_fast.generator.transformer import Block


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def _rotate(x: Tensor, factors: Tensor) -> Tensor:
    """x [B, heads, 1, D] turned by ``factors`` [2, D]."""
    swapped = torch.stack((x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    return (x * factors[0] + swapped * factors[1]).to(x.dtype)


def _block(
    block: Block, x: Tensor, condition: Tensor, factors: Tensor, mask: Tensor, cache: Tensor, position: int
) -> Tensor:
    """x [B, 1, width] through one block; cache [2, B, heads, T, D]."""
    gate_1, gate_2, scale_1, scale_2, shift_1, shift_2 = (
        F.linear(condition, block.adaln.weight, block.adaln.bias).unsqueeze(1).chunk(6, dim=-1)
    )
    attention, mlp = block.attention, block.mlp
    h = _norm(x, block.attention_norm.weight, block.eps) * (1 + scale_1) + shift_1
    heads = F.linear(h, attention.qkv.weight).unflatten(-1, (3, attention.num_heads, -1))
    q, k, v = heads.permute(2, 0, 3, 1, 4)
    cache[0, :, :, position : position + 1] = _rotate(k, factors)
    cache[1, :, :, position : position + 1] = v
    attended = F.scaled_dot_product_attention(_rotate(q, factors), cache[0], cache[1], attn_mask=mask)
    x = x + gate_1 * F.linear(attended.transpose(1, 2).flatten(2), attention.out.weight)
    h = _norm(x, block.mlp_norm.weight, block.eps) * (1 + scale_2) + shift_2
    gate, up = F.linear(h, mlp.gate_up.weight).chunk(2, dim=-1)
    return x + gate_2 * F.linear(F.silu(gate) * up, mlp.down.weight)


@torch.no_grad()
def sample(model: Generator, class_ids: Tensor, guidance: float, positions: int) -> tuple[Tensor, Tensor]:
    """The first ``positions`` tokens int64 [B, positions] of each class, and the last position's logits."""
    config, dtype = model.config, model.head.weight.dtype
    images = class_ids.shape[0]
    classes = torch.cat((class_ids, torch.full_like(class_ids, model.null_class)))
    cache = torch.zeros(
        config.depth, 2, 2 * images, config.num_heads, config.num_tokens, config.head_dim, dtype=dtype
    )
    tokens = torch.zeros(images, positions, dtype=torch.int64)
    logits = torch.zeros(images, config.vocab_size)
    for position in range(positions):
        class_vectors = model.class_embedding(classes)
        condition = F.silu(class_vectors)
        x = class_vectors if position == 0 else model.embed_tokens(tokens[:, position - 1].repeat(2))
        x = x.unsqueeze(1)
        factors = model.rotary.table[:, position, 0]
        mask = torch.arange(config.num_tokens) <= position
        for block, layer in zip(model.layers(), cache, strict=True):
            x = _block(block, x, condition, factors, mask.view(1, 1, 1, -1), layer, position)
        head_norm = model.head_norm
        scale, shift = (
            F.linear(condition, head_norm.adaln.weight, head_norm.adaln.bias).unsqueeze(1).chunk(2, dim=-1)
        )
        h = _norm(x, head_norm.norm.weight, head_norm.eps) * (1 + scale) + shift
        conditional, unconditional = F.linear(h[:, 0], model.head.weight).float().chunk(2)
        logits = unconditional + guidance * (conditional - unconditional)
        tokens[:, position] = logits.argmax(dim=-1)
    return tokens, logits
