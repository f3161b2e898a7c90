"""Perceptual distances by name."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ibq_fast.evaluate.trunks.efficientnet import EfficientNetStages, load_efficientnet_lite0

PerceptualName = Literal["none", "lpips", "efficientnet_lite0"]


def build_perceptual(name: PerceptualName, device: torch.device) -> nn.Module | None:
    """The distance called ``name`` on ``device``, frozen; None for ``none``.

    lpips: LPIPS with its VGG trunk, the published recipe's; the trunk is downloaded at first use.
    efficientnet_lite0: the same formula without learned weights over an EfficientNet-Lite0 trunk whose
    weights come as a package: for machines without a network. Its values are not LPIPS.

    It maps images and reconstructions, [B,C,H,W] in [-1, 1], to [B]. Raises ValueError when it cannot be
    had.
    """
    if name == "none":
        return None
    distance = _Frozen(_lpips() if name == "lpips" else TrunkDistance(_efficientnet_lite0()))
    return distance.to(device)


class TrunkDistance(nn.Module):
    """Sum over a trunk's stages of the mean over positions of |f(a) - f(b)|², features of unit length.

    ``trunk`` maps images [B, 3, H, W] to a list of feature maps.
    """

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        pairs = zip(self.trunk(a), self.trunk(b), strict=True)
        distances = [
            (F.normalize(x, dim=1) - F.normalize(y, dim=1)).square().sum(1).flatten(1).mean(1)
            for x, y in pairs
        ]
        return torch.stack(distances).sum(0)


def _lpips() -> nn.Module:
    try:
        import lpips
    except (ImportError, RuntimeError) as error:
        raise ValueError(
            f"perceptual: expected the lpips package for 'lpips' (pip install 'ibq_fast[lpips]'), got {error}"
        ) from error
    return lpips.LPIPS(net="vgg", verbose=False)


def _efficientnet_lite0() -> nn.Module:
    try:
        network, _ = load_efficientnet_lite0()
    except ImportError as error:
        raise ValueError(
            "perceptual: expected the packages of 'efficientnet_lite0' (pip install "
            f"'ibq_fast[efficientnet]'), got {error}"
        ) from error
    return EfficientNetStages(network)


class _Frozen(nn.Module):
    """A distance in float32, of grey images too, without gradients to its own weights."""

    def __init__(self, distance: nn.Module) -> None:
        super().__init__()
        self.distance = distance.eval().requires_grad_(False)

    def forward(self, images: Tensor, reconstructions: Tensor) -> Tensor:
        def three(x: Tensor) -> Tensor:
            return x.float().expand(-1, 3, -1, -1)

        return self.distance(three(images), three(reconstructions)).reshape(len(images), -1).mean(1)

    def train(self, mode: bool = True) -> _Frozen:
        """Stays in eval mode: its dropout has no place in a distance."""
        return super().train(False)
