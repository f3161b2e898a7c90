"""Blocks of the encoder and the decoder: residual block, single-head attention, changes of resolution.

All take and give [B, C, H, W] and keep a channels-last memory format where it comes in.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

NORM_GROUPS = 32
NORM_EPS = 1e-6


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(NORM_GROUPS, channels, eps=NORM_EPS)


class ResnetBlock(nn.Module):
    """Two 3x3 convolutions, each after group norm and swish, beside a shortcut (1x1 if channels change)."""

    def __init__(self, in_channels: int, out_channels: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1 = group_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut = (
            nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = self.conv2(self.dropout(F.silu(self.norm2(hidden))))
        return self.shortcut(x) + hidden


class SelfAttention(nn.Module):
    """One head of softmax attention between all positions, added to its input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.query = nn.Conv2d(channels, channels, 1)
        self.key = nn.Conv2d(channels, channels, 1)
        self.value = nn.Conv2d(channels, channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        rows = [layer(normed).flatten(2).mT.unsqueeze(1) for layer in (self.query, self.key, self.value)]
        attended = F.scaled_dot_product_attention(*rows)  # [B, 1, H*W, C], scaled by C**-0.5
        return x + self.out(attended.squeeze(1).mT.unflatten(2, x.shape[2:]))


class Downsample(nn.Conv2d):
    """Halve height and width: a 3x3 convolution of stride 2, padded on the right and below only."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Conv2d):
    """Double height and width: nearest neighbour, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Recomputed(nn.Module, ABC):
    """A part whose activations may be recomputed in the backward pass instead of kept: set ``recompute``."""

    recompute = False

    def forward(self, x: Tensor) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self.compute, x, use_reentrant=False)
        return self.compute(x)

    @abstractmethod
    def compute(self, x: Tensor) -> Tensor:
        """What the part does, without recomputation."""


class Middle(Recomputed):
    """The coarsest feature map's block, attention, block."""

    def __init__(self, channels: int, dropout: float) -> None:
        super().__init__()
        self.block1 = ResnetBlock(channels, channels, dropout)
        self.attention = SelfAttention(channels)
        self.block2 = ResnetBlock(channels, channels, dropout)

    def compute(self, x: Tensor) -> Tensor:
        return self.block2(self.attention(self.block1(x)))


class Level(Recomputed):
    """Residual blocks at one resolution, each with attention after it if the level attends, then a resize."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        blocks: int,
        attention: bool,
        dropout: float,
        resize: nn.Module | None,
    ) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * blocks
        self.blocks = nn.ModuleList(ResnetBlock(a, b, dropout) for a, b in pairwise(widths))
        self.attentions = nn.ModuleList(
            SelfAttention(out_channels) for _ in range(blocks if attention else 0)
        )
        self.resize = nn.Identity() if resize is None else resize

    def compute(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.blocks):
            x = block(x)
            if len(self.attentions):
                x = self.attentions[i](x)
        return self.resize(x)
