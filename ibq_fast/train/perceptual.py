"""Perceptual distances by name."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

PerceptualName = Literal["none", "lpips"]


def build_perceptual(name: PerceptualName, device: torch.device) -> nn.Module | None:
    """The distance called ``name`` on ``device``, frozen; None for ``none``.

    It maps images and reconstructions, [B,C,H,W] in [-1, 1], to [B]. Raises ValueError when it cannot be
    had.
    """
    if name == "none":
        return None
    try:
        import lpips
    except (ImportError, RuntimeError) as error:
        raise ValueError(
            f"perceptual: expected the lpips package for 'lpips' (pip install 'ibq_fast[lpips]'), got {error}"
        ) from error
    return _Lpips(lpips.LPIPS(net="vgg", verbose=False)).to(device)


class _Lpips(nn.Module):
    """LPIPS with its VGG trunk, in float32, without gradients to its own weights."""

    def __init__(self, distance: nn.Module) -> None:
        super().__init__()
        self.distance = distance.eval().requires_grad_(False)

    def forward(self, images: Tensor, reconstructions: Tensor) -> Tensor:
        def three(x: Tensor) -> Tensor:
            return x.float().expand(-1, 3, -1, -1)

        return self.distance(three(images), three(reconstructions)).flatten(1).mean(1)

    def train(self, mode: bool = True) -> _Lpips:
        """Stays in eval mode: its dropout has no place in a distance."""
        return super().train(False)
