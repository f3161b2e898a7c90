"""LPIPS through the ``lpips`` package, its trunk's weights from a file."""

from __future__ import annotations

import warnings
from typing import Literal

import torch
from torch import Tensor, nn

from ibq_fast.evaluate.trunks.weights import UnavailableError, Weights, is_published

LpipsName = Literal["alex", "vgg"]


class Lpips(nn.Module):
    """LPIPS 0.1 over AlexNet or VGG-16: images and copies [B, 1 or 3, H, W] in [-1, 1] -> float32 [B].

    name: "lpips_alex" or "lpips_vgg". sha256: of the trunk's weight file (the linear heads come with the
    package). Raises UnavailableError without the package, a torchvision that loads, or the weights;
    ValueError for a file that is not the trunk's.
    """

    def __init__(self, net: LpipsName, weights: Weights) -> None:
        super().__init__()
        self.name = f"lpips_{net}"
        try:
            import lpips
        except (ImportError, RuntimeError) as error:
            raise UnavailableError(
                f"needs pip install 'ibq_fast[lpips]' and a torchvision that fits torch ({error})"
            ) from error
        state, self.sha256 = weights.read(self.name)
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torchvision, of an argument that lpips still uses
            self.distance = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
        # lpips cuts torchvision's `features` into slices and keeps the layers' numbers.
        own = self.distance.net.state_dict()
        wanted = {key: f"features.{key.partition('.')[2]}" for key in own}
        missing = [
            name for key, name in wanted.items() if name not in state or state[name].shape != own[key].shape
        ]
        if missing:
            raise ValueError(
                f"{self.name}: these are not its trunk's weights: {missing[0]} is missing or misshapen"
            )
        self.distance.net.load_state_dict({key: state[name] for key, name in wanted.items()})

    @property
    def published(self) -> bool:
        """Whether its weights are those that the name stands for."""
        return is_published(self.name, self.sha256)

    @torch.no_grad()
    def forward(self, images: Tensor, copies: Tensor) -> Tensor:
        a, b = (x.float().expand(-1, 3, -1, -1) for x in (images, copies))
        value: Tensor = self.distance(a, b).flatten()
        return value

    def train(self, mode: bool = True) -> Lpips:
        """Stays in eval mode: its dropout has no place in a distance."""
        return super().train(False)


def build_lpips(net: LpipsName, weights: Weights, device: torch.device) -> Lpips:
    """LPIPS on ``device``, frozen. Raises as :class:`Lpips`."""
    return Lpips(net, weights).requires_grad_(False).eval().to(device)
