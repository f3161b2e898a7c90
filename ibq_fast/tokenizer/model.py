"""The tokenizer: encoder, quantizer, decoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ibq_fast.checkpoint.pretrained import PretrainedMixin, load_weights
from ibq_fast.checkpoint.reference import tokenizer_layout, tokenizer_state, tokenizer_weights
from ibq_fast.quantizer import QuantizerConfig, QuantizerOutput, build_quantizer
from ibq_fast.tokenizer.autoencoder import Decoder, Encoder
from ibq_fast.tokenizer.config import TokenizerConfig
from ibq_fast.tokenizer.layers import Recomputed

_RANGE_SLACK = 1e-3  # rounding of half-precision images, not overshoot of a resampling filter


class TokenizerOutput(NamedTuple):
    """``reconstruction`` [B, C, H, W], not clamped; ``quantizer``: indices [B, h, w], losses, entropies."""

    reconstruction: Tensor
    quantizer: QuantizerOutput


class Tokenizer(PretrainedMixin, nn.Module):
    """Images to a grid of code indices and back.

    Images are [B, image_channels, H, W], uint8 in 0…255 or floating point in [-1, 1], with H and W multiples
    of ``config.downsampling`` (f); the grid is H/f by W/f tokens. A wrong shape, dtype, device or range
    raises ``ValueError``. Moving the model to ``torch.channels_last`` is supported and usually faster.

    Reference checkpoints (``from_pretrained("….ckpt")``) take the overrides ``resolution=256`` (the training
    images' side, which no shape tells), ``dropout=0.0`` and ``quantizer={...}`` (fields of
    ``QuantizerConfig`` other than codebook size and dimension).
    """

    config_class: ClassVar[type] = TokenizerConfig

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(config.latent_channels, config.quantizer.dim, 1)
        self.quantizer = build_quantizer(config.quantizer)
        self.post_quant_conv = nn.Conv2d(config.quantizer.dim, config.latent_channels, 1)
        self.decoder = Decoder(config)

    @property
    def downsampling(self) -> int:
        """Pixels of the image's side per token."""
        return self.config.downsampling

    def checkpoint_activations(self, on: bool = True) -> None:
        """Whether training recomputes the activations of each level in the backward pass, to save memory."""
        for module in self.modules():
            if isinstance(module, Recomputed):
                module.recompute = on

    @property
    def last_layer(self) -> Tensor:
        """The weight of the decoder's last convolution, where the adaptive adversarial weight is measured."""
        return self.decoder.conv_out.weight

    def forward(self, images: Tensor) -> TokenizerOutput:
        """Encode, quantize, decode, with gradients.

        The range of floating-point images is not checked here (it would wait for the device at every step).
        """
        quantized = self.quantizer(self.features(images))
        return TokenizerOutput(self.decode_features(quantized.z_q), quantized)

    def features(self, images: Tensor) -> Tensor:
        """What the quantizer receives: [B, D, h, w], with gradients. The range is not checked."""
        return self.quant_conv(self.encoder(self._to_model(images)))

    def decode_features(self, z_q: Tensor) -> Tensor:
        """Images [B, C, H, W] from code vectors [B, D, h, w], with gradients, not clamped."""
        return self.decoder(self.post_quant_conv(z_q))

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Indices [B, h, w], int64, of ``images``. No gradients."""
        if isinstance(images, Tensor) and images.is_floating_point() and images.numel():
            low, high = (bound.item() for bound in torch.aminmax(images))
            if not (low >= -1 - _RANGE_SLACK and high <= 1 + _RANGE_SLACK):
                raise ValueError(
                    f"images: expected values in [-1, 1] or uint8, got values in [{low:g}, {high:g}]"
                )
        return self.quantizer.encode(self.features(images))

    @torch.no_grad()
    def decode(self, indices: Tensor, *, clamp: bool = False) -> Tensor:
        """Images [B, C, h*f, w*f] from ``indices`` [B, h, w] of any integer dtype. No gradients.

        The values are nominally in [-1, 1]; ``clamp`` cuts off what the decoder puts outside.
        """
        if not isinstance(indices, Tensor) or indices.ndim != 3:
            raise ValueError(f"indices: expected integers [B, h, w], got {_described(indices)}")
        if indices.dtype == torch.bool or indices.is_floating_point() or indices.is_complex():
            raise ValueError(f"indices: expected integers [B, h, w], got {indices.dtype}")
        indices = indices.long()
        size = self.config.quantizer.codebook_size
        if indices.numel():
            low, high = (bound.item() for bound in torch.aminmax(indices))
            if low < 0 or high >= size:
                raise ValueError(f"indices: expected 0 to {size - 1}, got {low} to {high}")
        images = self.decode_features(self.quantizer.decode(indices))
        return images.clamp_(-1, 1) if clamp else images

    def _to_model(self, images: Tensor) -> Tensor:
        """Images checked, as floating point in [-1, 1] in the weights' dtype."""
        channels, factor = self.config.image_channels, self.downsampling
        if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[1] != channels:
            raise ValueError(f"images: expected [B, {channels}, H, W], got {_described(images)}")
        height, width = images.shape[2:]
        if height % factor or width % factor or not height or not width:
            raise ValueError(
                f"images: expected height and width in multiples of {factor}, got {height} x {width}"
            )
        weight = self.encoder.conv_in.weight
        if images.device != weight.device:
            raise ValueError(f"images: expected them on {weight.device}, got {images.device}")
        if images.dtype == torch.uint8:
            return images.to(weight.dtype) / 127.5 - 1
        if not images.is_floating_point():
            raise ValueError(f"images: expected uint8 or floating point, got {images.dtype}")
        return images.to(weight.dtype)

    @classmethod
    def _from_reference(
        cls, path: Path, state_dict: dict[str, Tensor], *, ema: bool, **overrides: Any
    ) -> Tokenizer:
        state = tokenizer_state(state_dict, path)
        config = published_config(state, path, **overrides)
        weights = tokenizer_weights(
            state, expected_weights(config), path, levels=len(config.channel_multipliers), ema=ema
        )
        model = cls(config)
        state = {**model.state_dict(), **weights}
        if "quantizer.initialized" in state:  # the checkpoint's codes are not to be redrawn from features
            state["quantizer.initialized"] = torch.ones_like(state["quantizer.initialized"])
        load_weights(model, state, path)
        return model


def published_config(
    state: dict[str, Tensor],
    path: Path,
    *,
    resolution: int = 256,
    dropout: float = 0.0,
    quantizer: dict[str, Any] | None = None,
) -> TokenizerConfig:
    """The settings of a published tokenizer: what ``state``'s shapes say, the rest as given.

    Raises ``ValueError`` naming ``path`` for shapes or values that no tokenizer can have.
    """
    layout = tokenizer_layout(state, path)
    try:
        return TokenizerConfig(
            image_channels=layout.image_channels,
            resolution=resolution,
            base_channels=layout.base_channels,
            channel_multipliers=layout.channel_multipliers,
            num_res_blocks=layout.num_res_blocks,
            attention_resolutions=tuple(
                resolution // 2**level for level, attends in enumerate(layout.attention_levels) if attends
            ),
            latent_channels=layout.latent_channels,
            dropout=dropout,
            quantizer=QuantizerConfig(
                codebook_size=layout.codebook_size, dim=layout.code_dim, **(quantizer or {})
            ),
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def expected_weights(config: TokenizerConfig) -> dict[str, Tensor]:
    """The parameters that a published checkpoint has of such a tokenizer, by own name, on the meta device."""
    with torch.device("meta"):
        parameters = dict(Tokenizer(config).named_parameters())
    own = {name for name in parameters if name.startswith("quantizer.") and name != "quantizer.codebook"}
    return {name: p for name, p in parameters.items() if name not in own}


def _described(value: object) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
