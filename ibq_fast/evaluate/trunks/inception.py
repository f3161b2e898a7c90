"""InceptionV3 with the weights that FID, sFID and the Inception Score are defined by, through
torch-fidelity."""

from __future__ import annotations

import io
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ibq_fast.evaluate.trunks.base import Features, FeatureTrunk, InceptionInput
from ibq_fast.evaluate.trunks.weights import UnavailableError, Weights

_SIDE = 299
_SPATIAL_CHANNELS = 7


class InceptionTrunk(FeatureTrunk):
    """``pooled``: pool_3, 2,048 wide. ``spatial``: the first seven channels of mixed_6/conv, 17 x 17, as sFID
    takes them. ``logits``: 1,008, without their bias, as the Inception Score takes them.

    Two ways of feeding images are in use, and their figures differ. "tensorflow": resized to 299 as
    TensorFlow 1 does, (x - 128) / 128 of 0…255, as the original FID and ADM's evaluations. "pytorch-fid":
    resized by bilinear interpolation with half-pixel centres, in [-1, 1], as pytorch-fid and the published
    tokenizer's evaluation. Neither antialiases.

    Raises UnavailableError without torch-fidelity (which needs torchvision) or the weights.
    """

    name = "inception"
    width = 2048

    def __init__(self, weights: Weights, fed: InceptionInput) -> None:
        super().__init__()
        if fed not in ("tensorflow", "pytorch-fid"):
            raise ValueError(f"inception_input: expected tensorflow or pytorch-fid, got {fed!r}")
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
            from torch_fidelity.interpolate_compat_tensorflow import (
                interpolate_bilinear_2d_like_tensorflow1x as resize,
            )
        except (ImportError, RuntimeError) as error:
            raise UnavailableError(
                f"needs pip install 'ibq_fast[inception]' and a torchvision that fits torch ({error})"
            ) from error
        self.fed = fed
        self._resize: Any = resize
        state, self.sha256 = weights.read("inception")
        # torch-fidelity unpickles the file that it is given: this one was written here, from tensors alone.
        checked = io.BytesIO()
        torch.save(state, checked)
        checked.seek(0)
        try:
            with torch.random.fork_rng(devices=[]):
                self.network = FeatureExtractorInceptionV3(
                    "inception", ["2048"], feature_extractor_weights_path=checked
                )
        except RuntimeError as error:
            raise ValueError(f"inception: these are not its weights: {error}") from error

    def describe(self, side: int) -> str:
        if self.fed == "tensorflow":
            return f"resized to {_SIDE} px as TensorFlow 1 does (bilinear, not antialiased), (x - 128) / 128"
        return (
            f"resized to {_SIDE} px by bilinear interpolation (half-pixel centres, not antialiased), [-1, 1]"
        )

    def extract(self, images: Tensor) -> Features:
        size = (_SIDE, _SIDE)
        if self.fed == "tensorflow":
            x = (self._resize((images + 1) * 127.5, size=size, align_corners=False) - 128) / 128
        else:
            x = F.interpolate(images, size, mode="bilinear", align_corners=False)
        spatial = x
        for name, layer in self.network.named_children():
            if name == "fc":
                break
            if name == "Mixed_6d":
                spatial = layer.branch1x1(x)[:, :_SPATIAL_CHANNELS].flatten(1)
            x = layer(x)
        pooled = x.flatten(1)
        return Features(pooled, spatial, pooled @ self.network.fc.weight.T)
