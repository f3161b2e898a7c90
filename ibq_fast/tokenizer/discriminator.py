"""The patch discriminator of the adversarial loss."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor, nn

from ibq_fast.checkpoint.pretrained import check_weights, load_weights
from ibq_fast.checkpoint.reference import discriminator_weights, load_reference_state

_MAX_WIDENING = 8


class PatchDiscriminator(nn.Module):
    """PatchGAN: strided 4x4 convolutions with batch norm, one real-or-fake logit per patch.

    ``forward`` takes images [B, image_channels, H, W] in [-1, 1] and gives logits [B, 1, h, w]; with the
    default three strided layers each logit sees 70x70 pixels and h = H/8 - 2. Weights start from N(0, 0.02²).
    """

    def __init__(self, image_channels: int = 3, base_channels: int = 64, num_layers: int = 3) -> None:
        super().__init__()
        for name, value in (("image_channels", image_channels), ("base_channels", base_channels)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if not 1 <= num_layers <= 8:
            raise ValueError(f"num_layers: expected 1 to 8, got {num_layers}")
        self.image_channels = image_channels
        widths = [base_channels * min(2**i, _MAX_WIDENING) for i in range(num_layers + 1)]
        layers: list[nn.Module] = [
            nn.Conv2d(image_channels, base_channels, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2, inplace=True),
        ]
        for i in range(1, num_layers + 1):
            stride = 2 if i < num_layers else 1
            layers += [
                nn.Conv2d(widths[i - 1], widths[i], 4, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(widths[i]),
                nn.LeakyReLU(0.2, inplace=True),
            ]
        layers.append(nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.layers = nn.Sequential(*layers)
        self.apply(_initialize)

    def forward(self, images: Tensor) -> Tensor:
        if images.ndim != 4 or images.shape[1] != self.image_channels:
            raise ValueError(f"images: expected [B, {self.image_channels}, H, W], got {list(images.shape)}")
        return self.layers(images)

    @classmethod
    def from_reference(cls, path: str | os.PathLike[str]) -> PatchDiscriminator:
        """The discriminator in a tokenizer checkpoint of the published implementation, its size read off it.

        Raises ``ValueError`` naming the file and the key when there is none or its shapes do not fit.
        """
        source = Path(path)
        state = discriminator_weights(load_reference_state(source), source)
        convolutions = [tensor for name, tensor in state.items() if tensor.ndim == 4]
        base, channels = convolutions[0].shape[:2]
        with torch.device("meta"):
            check_weights(cls(channels, base, len(convolutions) - 2).state_dict(), state, source)
        with torch.random.fork_rng(devices=[]):
            model = cls(channels, base, len(convolutions) - 2)
        load_weights(model, state, source)
        return model


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)
