"""Protocols: every choice that moves a figure, named, versioned, and written into every report.

A figure without them cannot be compared: bicubic against bilinear resizing alone moves a published
tokenizer's rFID from 2.06 to 2.23."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from ibq_fast.evaluate.trunks import LpipsName, TrunkName
from ibq_fast.evaluate.trunks.base import InceptionInput

Resize = Literal["bicubic-antialiased", "bilinear-antialiased", "bilinear-opencv", "none"]


@dataclass(frozen=True)
class Protocol:
    """How images are prepared, and what is computed of them.

    name, version: a name stands for the same choices for ever within a version.
    resolution: side of the images in pixels; None: the tokenizer's, or that of the generated images.
    resize: of the shorter side to the resolution. "bicubic-antialiased" and "bilinear-antialiased": Pillow's.
        "bilinear-opencv": two taps without antialiasing, as OpenCV does by default. "none": images of another
        size are refused.
    crop: always the middle square. (With "bilinear-opencv" whole pixels are cropped after resizing, else the
        square of the original is resized.)
    rounding: how PSNR, SSIM and L1 see a reconstruction as uint8: "nearest" level, or "truncate", the way the
        published evaluation converts (originals too, in float32, which lowers a few of their pixels by one).
    features_of: whether LPIPS and the trunks see the rounded images ("uint8") or the decoder's output,
        clamped to [-1, 1] ("float").
    weights: of models whose files have both: "ema" or "live".
    trunks: networks for Fréchet distances, class scores and neighbours.
    inception_input: how Inception is fed, see ``InceptionTrunk``.
    lpips: trunks of LPIPS.
    ssim, psnr: their settings, in words.
    score_splits: parts of the set, in its order, that the class score is averaged over.
    neighbours: k of precision and recall. neighbour_images: at most so many images of each set, evenly
        spread; None: all.
    images: how many a figure under this name takes; None: any number.
    """

    name: str
    version: int
    resolution: int | None = None
    resize: Resize = "bicubic-antialiased"
    crop: Literal["center"] = "center"
    rounding: Literal["nearest", "truncate"] = "nearest"
    features_of: Literal["uint8", "float"] = "uint8"
    weights: Literal["ema", "live"] = "ema"
    trunks: tuple[TrunkName, ...] = ("inception", "efficientnet_lite0")
    inception_input: InceptionInput = "tensorflow"
    lpips: tuple[LpipsName, ...] = ("alex", "vgg")
    ssim: str = "7 x 7 uniform window, sample covariance, L = 255, mean over channels and inner windows"
    psnr: str = "mean over images of each one's PSNR, peak 255, all pixels and channels, at most 100 dB"
    score_splits: int = 10
    neighbours: int = 3
    neighbour_images: int | None = 10_000
    images: int | None = None

    def __post_init__(self) -> None:
        choices = {
            "resize": ("bicubic-antialiased", "bilinear-antialiased", "bilinear-opencv", "none"),
            "rounding": ("nearest", "truncate"),
            "features_of": ("uint8", "float"),
            "weights": ("ema", "live"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        for name, known in (("trunks", ("inception", "efficientnet_lite0")), ("lpips", ("alex", "vgg"))):
            if unknown := [value for value in getattr(self, name) if value not in known]:
                raise ValueError(f"{name}: expected some of {', '.join(known)}, got {unknown[0]!r}")
        for name in ("resolution", "neighbour_images", "images", "score_splits", "neighbours"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")

    def record(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}


PROTOCOLS: dict[str, Protocol] = {
    p.name: p
    for p in (
        # What would be written to PNG files, resized well.
        Protocol("uint8-bicubic", 1),
        # The published tokenizer's evaluation on ImageNet's 50,000 validation images.
        Protocol(
            "reference-256",
            1,
            resolution=256,
            resize="bilinear-opencv",
            rounding="truncate",
            features_of="float",
            trunks=("inception",),
            inception_input="pytorch-fid",
            images=50_000,
        ),
        # ADM's evaluation of 50,000 generated images, against its reference batch.
        Protocol(
            "adm-256",
            1,
            resolution=256,
            resize="none",
            trunks=("inception",),
            neighbour_images=None,
            images=50_000,
        ),
    )
}


def find_protocol(name: str, **changes: Any) -> Protocol:
    """The protocol called ``name``, with ``changes`` that are not None. What is changed is no longer that
    protocol: its name then says so. Raises ValueError for a name or a value that there is not."""
    if name not in PROTOCOLS:
        raise ValueError(f"protocol: expected one of {', '.join(PROTOCOLS)}, got {name!r}")
    original = PROTOCOLS[name]
    known = {field.name for field in fields(Protocol)}
    given = {key: value for key, value in changes.items() if value is not None}
    if unknown := sorted(set(given) - known):
        raise ValueError(f"protocol: no such setting: {', '.join(unknown)}")
    changed = replace(original, **given)
    different = sorted(
        key
        for key in given
        if getattr(changed, key) != getattr(original, key)
        and not (key == "resolution" and original.resolution is None)  # left open by the protocol
    )
    return replace(changed, name=f"{name}, changed: {', '.join(different)}") if different else changed


def differences(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Where two records of protocols (nested mappings of JSON values) differ, one line each."""
    found = []
    for key in dict.fromkeys([*a, *b]):
        x, y = a.get(key), b.get(key)
        if isinstance(x, Mapping) and isinstance(y, Mapping):
            found += differences(x, y, f"{prefix}{key}.")
        elif x != y:
            found.append(f"{prefix}{key}: {x} / {y}")
    return found
