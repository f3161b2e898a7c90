"""The blocks of the generator: RMSNorm and adaptive modulation, causal attention, gated MLP.

Every block is modulated by the class (adaLN). From the class embedding c it derives six vectors per image,
``gate_attention, gate_mlp, scale_attention, scale_mlp, shift_attention, shift_mlp``, and computes

    x <- x + gate_attention * attention(norm(x) * (1 + scale_attention) + shift_attention)
    x <- x + gate_mlp       * mlp(      norm(x) * (1 + scale_mlp)       + shift_mlp)

The norm's own weight w is folded into the scale: norm(x) * (1 + scale) = x/rms(x) * [w * (1 + scale)].
:meth:`Block.modulation` returns the six folded. Decoding one token at a time against a cache is
:mod:`ibq_fast.ops.generator_step`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ibq_fast.generator.config import GeneratorConfig
from ibq_fast.ops.generator_step import modulated_norm, rotate


class Modulation(NamedTuple):
    """What the class makes of a block: six tensors [B, width], norm weights folded into the scales."""

    attention_gate: Tensor
    mlp_gate: Tensor
    attention_scale: Tensor
    mlp_scale: Tensor
    attention_shift: Tensor
    mlp_shift: Tensor

    def over_sequence(self) -> Modulation:
        """The same as [B, 1, width], to broadcast over positions."""
        return Modulation(*(part.unsqueeze(1) for part in self))


class RMSNorm(nn.Module):
    """Weight of a root-mean-square norm; :func:`~ibq_fast.ops.generator_step.modulated_norm` applies it,
    folded into a scale."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))


class Attention(nn.Module):
    """Causal self-attention with rotary positions; several query heads may share a key and value head."""

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.kv_heads = config.kv_heads
        self.head_dim = config.head_dim
        self.dropout = config.attention_dropout
        heads = config.num_heads + 2 * config.kv_heads
        self.qkv = nn.Linear(config.width, heads * config.head_dim, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor, factors: Tensor) -> Tensor:
        """x [B, L, width], rotation ``factors`` of its L positions -> [B, L, width]."""
        qkv = self.qkv(x).unflatten(-1, (-1, self.head_dim))
        qk, v = qkv.split((self.num_heads + self.kv_heads, self.kv_heads), dim=2)
        q, k = rotate(qk, factors).split((self.num_heads, self.kv_heads), dim=2)
        attended = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            is_causal=True,
            dropout_p=self.dropout if self.training else 0.0,
            enable_gqa=self.kv_heads != self.num_heads,
        )
        return self.out(attended.transpose(1, 2).flatten(2))


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)); gate and up are one matrix, gate's rows first."""

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.gate_up = nn.Linear(config.width, 2 * config.hidden, bias=False)
        self.down = nn.Linear(config.hidden, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., width] -> [..., width]."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """Attention and MLP, each behind a modulated norm and a gate."""

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.residual_dropout = config.residual_dropout
        self.mlp_dropout = config.mlp_dropout
        self.attention_norm = RMSNorm(config.width)
        self.attention = Attention(config)
        self.mlp_norm = RMSNorm(config.width)
        self.mlp = GatedMLP(config)
        if config.shared_adaln:
            self.adaln_offset = nn.Parameter(torch.empty(6, config.width))
        else:
            self.adaln = nn.Linear(config.width, 6 * config.width)

    @torch.no_grad()
    def reset_modulation(self, config: GeneratorConfig) -> None:
        """Scale freshly drawn class projections: gates by ``gate_init``, scales and shifts by one half."""
        if config.shared_adaln:
            self.adaln_offset.normal_(0.0, config.width**-0.5)
            self.adaln_offset[:2] *= config.gate_init
            self.adaln_offset[2:] *= 0.5
            self.adaln_offset[:2] += config.gate_bias
        else:
            gates = 2 * config.width
            self.adaln.weight[:gates] *= config.gate_init
            self.adaln.weight[gates:] *= 0.5
            self.adaln.bias[:gates] = config.gate_bias

    def modulation(self, condition: Tensor) -> Modulation:
        """``condition`` [B, width] = silu(class embedding), or [B, 6 * width], the class projection that all
        blocks share."""
        return self.fold(condition if hasattr(self, "adaln_offset") else self.adaln(condition))

    def fold(self, projected: Tensor) -> Modulation:
        """The class's projection [B, 6 * width], the block's own or the shared one -> the modulation."""
        parts = projected.unflatten(-1, (6, -1))
        if hasattr(self, "adaln_offset"):
            parts = parts + self.adaln_offset
        gate_1, gate_2, scale_1, scale_2, shift_1, shift_2 = parts.unbind(-2)
        return Modulation(
            gate_1,
            gate_2,
            self.attention_norm.weight * (1 + scale_1),
            self.mlp_norm.weight * (1 + scale_2),
            shift_1,
            shift_2,
        )

    def forward(self, x: Tensor, condition: Tensor, factors: Tensor) -> Tensor:
        """x [B, L, width], ``condition`` as in :meth:`modulation`, rotation factors -> [B, L, width]."""
        mod = self.modulation(condition).over_sequence()
        attended = self.attention(
            modulated_norm(x, mod.attention_scale, mod.attention_shift, self.eps), factors
        )
        attended = F.dropout(attended, self.residual_dropout, self.training)
        x = torch.addcmul(x, attended, mod.attention_gate)
        expanded = self.mlp(modulated_norm(x, mod.mlp_scale, mod.mlp_shift, self.eps))
        expanded = F.dropout(expanded, self.mlp_dropout, self.training)
        return torch.addcmul(x, expanded, mod.mlp_gate)


class HeadNorm(nn.Module):
    """The last norm, modulated by the class: scale and shift, no gate."""

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.norm = RMSNorm(config.width)
        self.adaln = nn.Linear(config.width, 2 * config.width)

    def modulation(self, condition: Tensor) -> tuple[Tensor, Tensor]:
        """silu(class embedding) [B, width] -> scale (norm weight folded in) and shift, each [B, width]."""
        return self.fold(self.adaln(condition))

    def fold(self, projected: Tensor) -> tuple[Tensor, Tensor]:
        """The class's projection [B, 2 * width] -> scale and shift."""
        scale, shift = projected.chunk(2, dim=-1)
        return self.norm.weight * (1 + scale), shift

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x [B, L, width] -> [B, L, width]."""
        scale, shift = self.modulation(condition)
        return modulated_norm(x, scale.unsqueeze(1), shift.unsqueeze(1), self.eps)
