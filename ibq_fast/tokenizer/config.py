"""The tokenizer's settings."""

from __future__ import annotations

from dataclasses import dataclass, field

from ibq_fast.quantizer import QuantizerConfig

# Bounds refuse nonsense from a file before anything is built; no published model comes near them.
_MAX_RESOLUTION = 16384
_MAX_CHANNELS = 8192
_MAX_LEVELS = 8
_MAX_BLOCKS = 32


@dataclass(frozen=True)
class TokenizerConfig:
    """Architecture of a :class:`~ibq_fast.tokenizer.Tokenizer`; the defaults are the published 16x model.

    image_channels: 1 or 3.
    resolution: side of the training images in pixels. Other sizes work; it fixes which levels have attention.
    base_channels: channels of the first level, a multiple of 32 (the group norms have 32 groups).
    channel_multipliers: one per level; the image is halved between levels.
    num_res_blocks: residual blocks per level of the encoder; the decoder has one more.
    attention_resolutions: sides, in pixels at ``resolution``, of the levels whose blocks attend.
    latent_channels: channels between the encoder and the 1x1 convolution onto the code dimension.
    dropout: inside the residual blocks, in [0, 1).
    quantizer: codebook size, code dimension and losses.

    Raises ``ValueError`` for values outside these bounds.
    """

    image_channels: int = 3
    resolution: int = 256
    base_channels: int = 128
    channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 4
    attention_resolutions: tuple[int, ...] = (16,)
    latent_channels: int = 256
    dropout: float = 0.0
    quantizer: QuantizerConfig = field(default_factory=QuantizerConfig)

    def __post_init__(self) -> None:
        object.__setattr__(self, "channel_multipliers", tuple(self.channel_multipliers))
        object.__setattr__(self, "attention_resolutions", tuple(self.attention_resolutions))
        if self.image_channels not in (1, 3):
            raise ValueError(f"image_channels: expected 1 or 3, got {self.image_channels}")
        levels = len(self.channel_multipliers)
        if not 1 <= levels <= _MAX_LEVELS:
            raise ValueError(f"channel_multipliers: expected 1 to {_MAX_LEVELS} levels, got {levels}")
        if self.base_channels % 32:
            raise ValueError(f"base_channels: expected a multiple of 32, got {self.base_channels}")
        for multiplier in (1, *self.channel_multipliers):
            if multiplier < 1 or not 32 <= self.base_channels * multiplier <= _MAX_CHANNELS:
                raise ValueError(
                    f"base_channels, channel_multipliers: expected 32 to {_MAX_CHANNELS} channels per level, "
                    f"got {self.base_channels} x {multiplier}"
                )
        _check_range("num_res_blocks", self.num_res_blocks, 1, _MAX_BLOCKS)
        _check_range("latent_channels", self.latent_channels, 1, _MAX_CHANNELS)
        _check_range("resolution", self.resolution, self.downsampling, _MAX_RESOLUTION)
        if self.resolution % self.downsampling:
            raise ValueError(
                f"resolution: expected a multiple of {self.downsampling} for {levels} levels, "
                f"got {self.resolution}"
            )
        sides = self.level_resolutions
        for side in self.attention_resolutions:
            if side not in sides:
                raise ValueError(f"attention_resolutions: expected some of {list(sides)}, got {side}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout: expected a share in [0, 1), got {self.dropout}")

    @property
    def downsampling(self) -> int:
        """Pixels of the image's side per token."""
        return int(2 ** (len(self.channel_multipliers) - 1))

    @property
    def level_resolutions(self) -> tuple[int, ...]:
        """Side of each level's feature map, in pixels, finest first."""
        return tuple(self.resolution // 2**i for i in range(len(self.channel_multipliers)))

    @property
    def level_channels(self) -> tuple[int, ...]:
        """Channels of each level, finest first."""
        return tuple(self.base_channels * multiplier for multiplier in self.channel_multipliers)

    @property
    def attention_levels(self) -> tuple[bool, ...]:
        """Whether each level attends, finest first."""
        return tuple(side in self.attention_resolutions for side in self.level_resolutions)

    @property
    def grid(self) -> tuple[int, int]:
        """Tokens (h, w) of a training image."""
        side = self.resolution // self.downsampling
        return side, side


def _check_range(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name}: expected {low} to {high}, got {value}")
