"""Resize and crop, the random numbers behind them, and pixel ranges."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import picture
from PIL import Image

from ibq_fast.data import InMemoryImages, SquareCrop, counter, to_float, to_uint8


def test_right_size_passes_unchanged() -> None:
    image = picture(32, 32, 0)
    for crop in ("center", "random"):
        result = SquareCrop(32, crop)(image, 0, 0, 0)
        np.testing.assert_array_equal(result.permute(1, 2, 0), np.asarray(image))


@pytest.mark.parametrize("size", [(48, 24), (24, 48), (96, 25), (25, 96)])
def test_center_keeps_the_middle(size: tuple[int, int]) -> None:
    """Left and right (or top and bottom) thirds are red and blue, the middle is green."""
    width, height = size
    pixels = np.zeros((height, width, 3), np.uint8)
    side = min(size)
    pixels[..., 0] = 255
    left, top = (width - side) // 2, (height - side) // 2
    pixels[top : top + side, left : left + side] = (0, 255, 0)
    result = SquareCrop(12, "center")(Image.fromarray(pixels), 0, 0, 0)
    assert result.shape == (3, 12, 12)
    assert (result[1, 2:-2, 2:-2] > 250).all()
    assert (result[0, 2:-2, 2:-2] < 5).all()


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_reduction_is_antialiased(interpolation: str) -> None:
    """A one-pixel checkerboard reduced by four is flat grey; without a wide filter it is noise."""
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    result = SquareCrop(16, "center", interpolation=interpolation)(Image.fromarray(board), 0, 0, 0)
    assert result.shape == (1, 16, 16)
    assert (result.int() - 127).abs().max() <= 4


def test_interpolations_differ() -> None:
    image = picture(50, 50, 3)
    results = [SquareCrop(20, interpolation=name)(image, 0, 0, 0) for name in ("bicubic", "bilinear")]
    assert not torch.equal(*results)


@given(
    width=st.integers(1, 300),
    height=st.integers(1, 300),
    crop=st.sampled_from(["center", "random", "random_resized"]),
    min_scale=st.floats(0.01, 1.0),
    index=st.integers(0, 2**40),
)
@settings(max_examples=100, deadline=None)
def test_box_lies_in_the_image(width: int, height: int, crop: str, min_scale: float, index: int) -> None:
    transform = SquareCrop(8, crop, min_scale)
    left, top, right, bottom = transform._box(width, height, 1, 2, index)
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    share = (right - left) * (bottom - top) / (width * height)
    if crop == "random_resized" and 3 / 4 <= width / height <= 4 / 3:
        assert share >= min_scale * 0.74
    if crop != "random_resized":
        assert right - left == pytest.approx(min(width, height))
    assert transform(Image.new("RGB", (width, height)), 1, 2, index).shape == (3, 8, 8)


def test_random_crops_cover_the_image_and_flip_half() -> None:
    wide = Image.fromarray(np.tile(np.arange(200, dtype=np.uint8), (50, 1)))
    transform = SquareCrop(50, "random", flip=True)
    results = torch.stack([transform(wide, 0, 0, index) for index in range(400)])
    left = results.amin((1, 2, 3))
    assert left.min() < 5
    assert left.max() > 145
    mirrored = (results[:, 0, 0, 0] > results[:, 0, 0, -1]).sum().item()
    assert 160 <= mirrored <= 240, "four standard deviations about 200"


CONTRADICTIONS = {
    "resolution": ({"resolution": 0}, "resolution: expected at least 1 pixel, got 0"),
    "crop": ({"crop": "middle"}, "crop: expected one of center, random, random_resized, got 'middle'"),
    "min_scale": ({"min_scale": 0.0}, r"min_scale: expected a share of the area in \(0, 1\], got 0.0"),
    "interpolation": ({"interpolation": "nearest"}, "interpolation: expected one of bicubic, bilinear"),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_unusable_options(name: str) -> None:
    options, message = CONTRADICTIONS[name]
    with pytest.raises(ValueError, match=message):
        SquareCrop(**{"resolution": 8, **options})


def test_random_numbers_are_uniform_in_every_word_of_the_key() -> None:
    """Chi-squared over 64 bins, 63 degrees of freedom: below 121 with probability 1 - 1e-5."""
    n = 64_000
    keys = {
        "index": counter.uniform(3, 1, np.arange(n), counter.FLIP),
        "draw": counter.uniform(3, 1, 5, np.arange(n)),
        "epoch": np.concatenate([counter.uniform(3, e, np.arange(64), 1) for e in range(n // 64)]),
        "seed": np.concatenate([counter.uniform(s, 0, np.arange(64), 1) for s in range(n // 64)]),
    }
    for name, draws in keys.items():
        counts = np.bincount((draws * 64).astype(int), minlength=64)
        assert ((counts - n / 64) ** 2 / (n / 64)).sum() < 121, name


def test_random_numbers_never_change() -> None:
    """A change here changes every seeded run: it belongs in the changelog."""
    assert counter.permutation(0, 0, 8).tolist() == PERMUTATION
    assert counter.random_bits(7, 3, [0, 1], counter.FLIP).tolist() == BITS


PERMUTATION = [6, 0, 3, 5, 4, 7, 1, 2]
BITS = [10344916622981709479, 2826987509315806722]


def test_flips_follow_seed_epoch_and_index() -> None:
    images = torch.arange(200, dtype=torch.uint8).reshape(100, 1, 1, 2)
    plain = InMemoryImages(images, torch.arange(100), ("x",))
    flipped = InMemoryImages(images, torch.arange(100), ("x",), flip=True, seed=1)
    order = np.arange(100)
    assert torch.equal(plain.batch(0, order)[0], images)
    first = flipped.batch(0, order)[0]
    assert torch.equal(first.sort(-1).values, images)
    assert 25 < (first != images).any(-1).sum() < 75
    assert not torch.equal(first, flipped.batch(1, order)[0])
    assert torch.equal(flipped.batch(0, order[::-1].copy())[0], first.flip(0))
    assert torch.equal(torch.stack([flipped[0, i][0] for i in range(100)]), first)


def test_pixel_ranges() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    floats = to_float(levels)
    assert floats.dtype == torch.float32
    assert floats[0] == -1
    assert floats[-1] == 1
    assert torch.equal(to_uint8(floats), levels)
    assert to_uint8(torch.tensor([-3.0, 3.0, 0.0])).tolist() == [0, 255, 128]
    assert torch.equal(to_uint8(floats.bfloat16())[[0, -1]], levels[[0, -1]])
    with pytest.raises(ValueError, match=r"images: expected uint8, got torch.float32"):
        to_float(floats)
    with pytest.raises(ValueError, match=r"images: expected floating point"):
        to_uint8(levels)


UNUSABLE_SETS = {
    "images": (
        torch.zeros(4, 2, 3, 3, dtype=torch.uint8),
        torch.zeros(4, dtype=torch.int64),
        None,
        "images: expected",
    ),
    "dtype": (torch.zeros(4, 1, 3, 3), torch.zeros(4, dtype=torch.int64), None, "images: expected uint8"),
    "labels": (
        torch.zeros(4, 1, 3, 3, dtype=torch.uint8),
        torch.zeros(3, dtype=torch.int64),
        None,
        "labels: expected",
    ),
    "channels": (
        torch.zeros(4, 3, 3, 3, dtype=torch.uint8),
        torch.zeros(4, dtype=torch.int64),
        1,
        "channels: expected",
    ),
}


@pytest.mark.parametrize("name", UNUSABLE_SETS)
def test_in_memory_arguments(name: str) -> None:
    images, labels, channels, message = UNUSABLE_SETS[name]
    with pytest.raises(ValueError, match=message):
        InMemoryImages(images, labels, ("a",), channels=channels)
