"""What a run reads: one dataclass, and from it data sets and loaders."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from ibq_fast.data.decode import MAX_PIXELS
from ibq_fast.data.fashion_mnist import RESOLUTION as FASHION_MNIST_RESOLUTION
from ibq_fast.data.fashion_mnist import fashion_mnist
from ibq_fast.data.image_folder import ImageFolder
from ibq_fast.data.in_memory import InMemoryImages
from ibq_fast.data.loader import Loader
from ibq_fast.data.paths import class_folders
from ibq_fast.data.sampler import ResumableBatchSampler
from ibq_fast.data.shard_reader import find_shards
from ibq_fast.data.shards import ShardLoader
from ibq_fast.data.transform import Crop, SquareCrop, SquareViews

Split = Literal["train", "val"]


@dataclass(frozen=True)
class DataConfig:
    """Which images a run reads, and how.

    Args:
        kind: "image_folder", "shards" (tar files as webdataset lays them out), or "fashion_mnist" (embedded:
            14,000 training and 2,000 held-out images).
        root: image_folder: folder of class folders, root/class/name.jpg, with images of any size. shards:
            their names, such as "train-{0000..0299}.tar", "shards/*.tar", "https://…/{00..99}.tar" or
            "pipe:aws s3 cp s3://…/{00..99}.tar -", several of them with "::" in between.
        val_root: held-out images: in the same class folders (or give val_fraction), or in other shards.
        val_fraction: image_folder: share of root held out, chosen by a hash of each path; or give val_root.
        resolution: side of the square images in pixels (32 for fashion_mnist).
        channels: 3 (RGB) or 1 (grey).
        crop: training: "random" (shorter side to resolution, then a random square), "random_resized" (a
            random box, see min_crop_scale) or "center"; evaluation always uses "center".
        min_crop_scale: smallest share of the image's area in a random_resized crop, in (0, 1].
        flip: training: mirror images left to right with probability 1/2.
        interpolation: "bicubic" or "bilinear", both antialiased.
        batch_size: images per process and step.
        num_workers: processes that decode images (not fashion_mnist), per training process; 0 decodes in it.
        shuffle_buffer: shards: samples of which a worker draws the next one at random (beside the random
            order of the shards).
        resample: shards: draw shards with replacement, without epochs; for more processes than shards.
        max_bad_fraction: the run stops when more than this share of the images is unreadable.
        max_pixels: larger images count as unreadable (decompression bombs).

    Raises ValueError for values out of range.
    """

    kind: Literal["fashion_mnist", "image_folder", "shards"] = "image_folder"
    root: str | None = None
    val_root: str | None = None
    val_fraction: float = 0.0
    resolution: int = 256
    channels: Literal[1, 3] = 3
    crop: Literal["random", "random_resized", "center"] = "random"
    min_crop_scale: float = 0.5
    flip: bool = True
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    batch_size: int = 32
    num_workers: int = 2
    max_bad_fraction: float = 0.01
    max_pixels: int = MAX_PIXELS
    shuffle_buffer: int = 1000
    resample: bool = False

    def __post_init__(self) -> None:
        if self.kind not in ("fashion_mnist", "image_folder", "shards"):
            raise ValueError(f'kind: expected "fashion_mnist", "image_folder" or "shards", got {self.kind!r}')
        for name, least in (
            ("resolution", 1),
            ("batch_size", 1),
            ("num_workers", 0),
            ("max_pixels", 1),
            ("shuffle_buffer", 0),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        if self.kind == "shards" and self.val_fraction > 0.0:
            raise ValueError(f"val_fraction: expected val_root for shards, got {self.val_fraction}")
        if self.channels not in (1, 3):
            raise ValueError(f"channels: expected 1 or 3, got {self.channels}")
        if self.val_root is not None and self.val_fraction > 0.0:
            raise ValueError(f"val_root: expected no val_fraction beside it, got {self.val_fraction}")


def build_dataset(config: DataConfig, split: Split, *, seed: int = 0) -> ImageFolder | InMemoryImages:
    """The training set, cropped and flipped at random, or the held-out set, always the same.

    Raises ValueError for an option that is missing or does not fit, DataError for data that is missing or
    damaged.
    """
    if split not in ("train", "val"):
        raise ValueError(f'split: expected "train" or "val", got {split!r}')
    train = split == "train"
    if config.kind == "shards":
        raise ValueError(
            "kind: expected image_folder or fashion_mnist, whose images have numbers, got shards"
        )
    if config.kind == "fashion_mnist":
        if config.resolution != FASHION_MNIST_RESOLUTION:
            raise ValueError(f"resolution: expected 32 for fashion_mnist, got {config.resolution}")
        name = "train" if train else "test"
        return fashion_mnist(name, channels=config.channels, flip=config.flip and train, seed=seed)
    return _image_folder(config, train, seed)


def build_loader(
    config: DataConfig,
    split: Split,
    *,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    pin_memory: bool | None = None,
) -> Loader | ShardLoader:
    """Batches of uint8 images [B, C, H, W] and int64 labels [B] of this rank.

    Training: shuffled anew in each epoch, full batches only, resumable (``state_dict``, ``set_position``).
    Held-out: in order, every image exactly once over all ranks.

    Args:
        config: which images.
        split: "train" or "val".
        seed: of order, crops and flips; the same on every rank.
        rank, world_size: this process and how many there are; each gets its own share of every step.
        pin_memory: page-locked batches; None: when there is a CUDA device.

    Raises as ``build_dataset``, and ValueError when there are fewer training images than one step takes, or
    fewer shards than workers.
    """
    train = split == "train"
    if config.kind == "shards":
        return _shards(config, train, seed, rank, world_size, pin_memory)
    dataset = build_dataset(config, split, seed=seed)
    sampler = ResumableBatchSampler(
        len(dataset),
        config.batch_size,
        seed=seed,
        shuffle=train,
        drop_last=train,
        rank=rank,
        world_size=world_size,
    )
    return Loader(dataset, sampler, train=train, num_workers=config.num_workers, pin_memory=pin_memory)


def build_view_loader(config: DataConfig, split: Split, views: int = 1) -> Loader | ShardLoader:
    """Every good image of a split once, in order, as ``views`` squares: the middle one, and others by crop.

    Batches of uint8 [B, views, C, R, R] and int64 labels [B]; always the same, never mirrored, all of them on
    this process. Raises as :func:`build_loader`, and ValueError for more views than the settings can draw.
    """
    if views < 1:
        raise ValueError(f"views: expected at least 1, got {views}")
    if views > 1 and config.crop == "center":
        raise ValueError(f"views: expected 1 with crop center, whose squares are all one, got {views}")
    if views > 1 and config.kind == "fashion_mnist":
        raise ValueError(f"views: expected 1 for fashion_mnist, whose images fill their squares, got {views}")
    squares = SquareViews(_square_crop(config, config.crop), views)
    train = split == "train"
    if config.kind == "shards":
        return _shards(config, train, 0, 0, 1, None, squares)
    dataset: ImageFolder | InMemoryImages
    if config.kind == "fashion_mnist":
        dataset = build_dataset(replace(config, flip=False), split)
    else:
        dataset = _image_folder(config, train, 0, squares)
    sampler = ResumableBatchSampler(len(dataset), config.batch_size, shuffle=False, drop_last=False)
    return Loader(dataset, sampler, train=False, num_workers=config.num_workers)


def _shards(
    config: DataConfig,
    train: bool,
    seed: int,
    rank: int,
    world_size: int,
    pin_memory: bool | None,
    views: SquareViews | None = None,
) -> ShardLoader:
    """``views``: instead of what training and evaluation see, in order."""
    pattern = config.root if train else config.val_root
    if pattern is None:
        raise ValueError(
            f"{'root' if train else 'val_root'}: expected names of shards for kind shards, got none"
        )
    crop = _square_crop(config, config.crop if train else "center", config.flip and train)
    return ShardLoader(
        find_shards(pattern),
        views or crop,
        train=train and views is None,
        channels=config.channels,
        max_pixels=config.max_pixels,
        max_bad_fraction=config.max_bad_fraction,
        batch_size=config.batch_size,
        seed=seed,
        buffer=config.shuffle_buffer,
        resample=config.resample,
        num_workers=config.num_workers,
        rank=rank,
        world_size=world_size,
        pin_memory=pin_memory,
    )


def _square_crop(config: DataConfig, crop: Crop, flip: bool = False) -> SquareCrop:
    return SquareCrop(config.resolution, crop, config.min_crop_scale, flip, config.interpolation)


def _image_folder(
    config: DataConfig, train: bool, seed: int, views: SquareViews | None = None
) -> ImageFolder:
    """``views``: instead of what training and evaluation see; bad images are left out, not replaced."""
    if config.root is None:
        raise ValueError("root: expected a folder of class folders for kind image_folder, got none")
    if not train and config.val_root is None and config.val_fraction == 0.0:
        raise ValueError("val_root: expected it, or val_fraction, for held-out images, got neither")
    separate = not train and config.val_root is not None
    part: Literal["all", "train", "val"] = "all"
    if config.val_fraction > 0.0:
        part = "train" if train else "val"
    folder = ImageFolder(
        config.val_root if separate and config.val_root is not None else config.root,
        config.resolution,
        train=train and views is None,
        channels=config.channels,
        crop=config.crop,
        min_scale=config.min_crop_scale,
        flip=config.flip,
        interpolation=config.interpolation,
        max_bad_fraction=config.max_bad_fraction,
        max_pixels=config.max_pixels,
        classes=class_folders(config.root) if separate else None,
        part=part,
        val_fraction=config.val_fraction,
        seed=seed,
    )
    if views is not None:
        folder.transform = views
    return folder
