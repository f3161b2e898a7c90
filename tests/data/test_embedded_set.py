"""The embedded Fashion-MNIST: complete, balanced, small, and its damage is noticed."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
import torch

import ibq_fast.data
from ibq_fast.data import DataError, fashion_mnist

FOLDER = Path(ibq_fast.data.__file__).parent / "fashion_mnist"


@pytest.mark.parametrize(("split", "per_class"), [("train", 1400), ("test", 200)])
def test_images_are_balanced_and_padded(split: str, per_class: int) -> None:
    images = fashion_mnist(split)
    assert images.images.shape == (10 * per_class, 1, 32, 32)
    assert images.images.dtype == torch.uint8
    assert torch.bincount(images.labels).tolist() == [per_class] * 10
    assert torch.bincount(images.labels[:50]).tolist() == [5] * 10
    inner = images.images[:, :, 2:-2, 2:-2]
    assert images.images.sum() == inner.sum(), "the border of two pixels is black"
    assert len(torch.unique(images.images.flatten(1), dim=0)) > 0.99 * len(images), "images differ"


def test_classes_look_like_their_names() -> None:
    """A check of the labels by geometry: trousers are tall, sneakers and sandals flat."""
    images = fashion_mnist("test")
    shape = {}
    for label, name in enumerate(images.classes):
        drawn = images.images[images.labels == label, 0] > 40
        height = drawn.any(2).sum(1).float().mean()
        width = drawn.any(1).sum(1).float().mean()
        shape[name] = float(height / width)
    assert shape["Trouser"] > 1.7
    assert shape["Dress"] > 1.5
    assert shape["Sneaker"] < 0.7
    assert shape["Sandal"] < 0.8


def test_train_and_test_share_no_image() -> None:
    train = {image.numpy().tobytes() for image in fashion_mnist("train").images}
    assert not any(image.numpy().tobytes() in train for image in fashion_mnist("test").images)


def test_folder_is_small_licensed_and_quick_to_load() -> None:
    assert sum(file.stat().st_size for file in FOLDER.iterdir() if file.is_file()) <= 6_000_000
    licence = (FOLDER / "LICENSE").read_text()
    assert "2017, Zalando SE" in licence
    assert "Permission is hereby granted, free of charge" in licence
    start = time.process_time()
    fashion_mnist("train")
    assert time.process_time() - start < 2.0


def test_readme_names_the_checksums_of_the_manifest() -> None:
    manifest = json.loads((FOLDER / "manifest.json").read_text())
    readme = (FOLDER / "README.md").read_text()
    for split in manifest["splits"].values():
        assert split["sha256"] in readme
    for checksum in manifest["sources"].values():
        assert checksum in readme


def test_channels_are_copies_of_the_grey_one() -> None:
    image, label = fashion_mnist("test", channels=3)[7]
    assert image.shape == (3, 32, 32)
    assert label == 7
    assert torch.equal(image[0], image[1])
    assert torch.equal(image[:1], fashion_mnist("test")[7][0])


@pytest.mark.parametrize("damage", ["flip a bit", "truncate", "remove", "manifest"])
def test_damage_is_a_clear_error(damage: str, tmp_path: Path) -> None:
    for name in ("test.xz", "manifest.json"):
        shutil.copy(FOLDER / name, tmp_path / name)
    file = tmp_path / "test.xz"
    data = bytearray(file.read_bytes())
    if damage == "flip a bit":
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    elif damage == "truncate":
        file.write_bytes(data[:-100])
    elif damage == "remove":
        file.unlink()
    else:
        (tmp_path / "manifest.json").write_text("{")
    expected = (
        "cannot be read" if damage in ("remove", "manifest") else r"test\.xz: damaged: expected 712016 bytes"
    )
    with pytest.raises(DataError, match=expected):
        fashion_mnist("test", folder=tmp_path)


def test_unknown_split() -> None:
    with pytest.raises(ValueError, match='split: expected "train" or "test", got \'val\''):
        fashion_mnist("val")
