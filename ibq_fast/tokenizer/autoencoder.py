"""The VQGAN encoder and decoder."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ibq_fast.tokenizer.config import TokenizerConfig
from ibq_fast.tokenizer.layers import Downsample, Level, Middle, Upsample, group_norm


class Encoder(nn.Module):
    """Images [B, image_channels, H, W] to latents [B, latent_channels, H/f, W/f], f = config.downsampling."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        channels = config.level_channels
        entering = (config.base_channels, *channels[:-1])
        self.conv_in = nn.Conv2d(config.image_channels, config.base_channels, 3, padding=1)
        self.levels = nn.ModuleList(
            Level(
                entering[i],
                channels[i],
                blocks=config.num_res_blocks,
                attention=config.attention_levels[i],
                dropout=config.dropout,
                resize=Downsample(channels[i]) if i < len(channels) - 1 else None,
            )
            for i in range(len(channels))
        )
        self.middle = Middle(channels[-1], config.dropout)
        self.norm_out = group_norm(channels[-1])
        self.conv_out = nn.Conv2d(channels[-1], config.latent_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv_in(images)
        for level in self.levels:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.middle(x))))


class Decoder(nn.Module):
    """Latents [B, latent_channels, h, w] to images [B, image_channels, h*f, w*f].

    ``levels`` stand in the order they run, coarsest first.
    """

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        channels = config.level_channels[::-1]
        attention = config.attention_levels[::-1]
        entering = (channels[0], *channels[:-1])
        self.conv_in = nn.Conv2d(config.latent_channels, channels[0], 3, padding=1)
        self.middle = Middle(channels[0], config.dropout)
        self.levels = nn.ModuleList(
            Level(
                entering[i],
                channels[i],
                blocks=config.num_res_blocks + 1,
                attention=attention[i],
                dropout=config.dropout,
                resize=Upsample(channels[i]) if i < len(channels) - 1 else None,
            )
            for i in range(len(channels))
        )
        self.norm_out = group_norm(channels[-1])
        self.conv_out = nn.Conv2d(channels[-1], config.image_channels, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        x = self.middle(self.conv_in(latents))
        for level in self.levels:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))
