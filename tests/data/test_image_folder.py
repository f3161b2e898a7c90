"""Folders of images: classes, splits, what is random, what is bad, what is missing."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest
import torch
from pictures import picture

from ibq_fast.data import DataConfig, DataError, ImageFolder, build_dataset

Damaged = tuple[Path, set[Path]]


def test_classes_are_sorted_and_images_labelled(photos: Path) -> None:
    (photos / ".cache").mkdir()
    (photos / "notes.txt").write_text("beside the classes")
    (photos / "bee" / "more" / "deeper").mkdir(parents=True)
    picture(10, 10, 0).save(photos / "bee" / "more" / "deeper" / "UPPER.PNG")
    (photos / "bee" / "list.csv").write_text("no image")
    folder = ImageFolder(photos, 16, train=False)
    assert folder.classes == ("ant", "bee", "cat")
    assert len(folder) == 25
    assert [folder[i][1] for i in range(25)] == [0] * 8 + [1] * 9 + [2] * 8
    image, _ = folder[-1]
    assert image.shape == (3, 16, 16)
    assert image.dtype == torch.uint8
    assert ImageFolder(photos, 16, train=False, channels=1)[0][0].shape == (1, 16, 16)
    with pytest.raises(IndexError, match="index: expected one below 25, got 25"):
        folder[25]


def test_names_that_are_not_utf8(photos: Path) -> None:
    odd = bytes(photos / "ant") + b"/\xff\xe9.png"
    shutil.copy(photos / "ant" / "00.png", odd)
    folder = ImageFolder(photos, 16, train=False)
    assert len(folder) == 25
    assert bytes(folder.paths[8]) == odd
    assert folder[8][0].shape == (3, 16, 16)


def test_evaluation_is_the_same_in_every_epoch(photos: Path) -> None:
    folder = ImageFolder(photos, 16, train=False, flip=True, crop="random")
    assert all(torch.equal(folder[0, i][0], folder[9, i][0]) for i in range(len(folder)))


def test_training_views_follow_seed_epoch_and_index(photos: Path) -> None:
    def views(seed: int, epoch: int) -> torch.Tensor:
        folder = ImageFolder(photos, 16, train=True, crop="random_resized", seed=seed)
        return torch.stack([folder[epoch, i][0] for i in reversed(range(len(folder)))])

    first = views(1, 2)
    assert torch.equal(first, views(1, 2))
    for other in (views(1, 3), views(2, 2)):
        assert (first != other).flatten(1).any(1).all()


def test_bad_images_are_named_once_and_replaced(damaged: Damaged, caplog: pytest.LogCaptureFixture) -> None:
    root, bad = damaged
    folder = ImageFolder(root, 16, train=True, max_bad_fraction=0.2)
    with caplog.at_level(logging.WARNING):
        first = [folder[1, i] for i in range(len(folder))]
        second = [folder[1, i] for i in range(len(folder))]
    assert {path for path, _ in folder.bad} == bad
    assert folder.report() == 4
    for path in bad:
        assert sum(str(path) in message for message in caplog.messages) == 1
    reasons = {path.name: reason for path, reason in folder.bad}
    assert reasons["02.webp"] == "the file is empty"
    assert "not an image" in reasons["01.jpg"]
    assert reasons["00.png"] == reasons["05.jpg"] == "truncated or corrupt"
    fresh = ImageFolder(root, 16, train=True, max_bad_fraction=0.2)
    backwards = [fresh[1, i] for i in reversed(range(len(fresh)))][::-1]
    for a, b, c in zip(first, second, backwards, strict=True):
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[0], c[0])
        assert a[1] == b[1] == c[1]


def test_replacements_differ_between_epochs(damaged: Damaged) -> None:
    root, _ = damaged
    folder = ImageFolder(root, 16, train=False, max_bad_fraction=0.2)
    assert len({folder[epoch, 0][0].numpy().tobytes() for epoch in range(10)}) > 1


def test_too_many_bad_images_stop_the_run(damaged: Damaged) -> None:
    root, _ = damaged
    folder = ImageFolder(root, 16, train=True, max_bad_fraction=0.1)
    message = (
        r"photos: 3 of 24 images are bad, more than max_bad_fraction 0\.1: .*00\.png \(truncated or corrupt\)"
    )
    with pytest.raises(DataError, match=message):
        folder.__getitems__(range(len(folder)))


def test_exactly_the_share_is_tolerated(damaged: Damaged) -> None:
    root, _ = damaged
    folder = ImageFolder(root, 16, train=True, max_bad_fraction=4 / 24)
    assert len([folder[i] for i in range(24)]) == 24


def test_only_bad_images(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for i in range(3):
        (tmp_path / "a" / f"{i}.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"\.png: bad, and so are 100 images drawn to replace it"):
        ImageFolder(tmp_path, 16, train=True, max_bad_fraction=1.0)[0]


def test_decompression_bomb_is_a_bad_image(photos: Path) -> None:
    picture(300, 300, 0).save(photos / "ant" / "huge.png")
    folder = ImageFolder(photos, 16, train=False, max_pixels=50_000, max_bad_fraction=0.0)
    with pytest.raises(DataError, match=r"huge\.png \(more pixels than max_pixels"):
        folder[8]


def _missing(root: Path) -> None:
    shutil.rmtree(root)


def _file(root: Path) -> None:
    _missing(root)
    root.write_text("")


def _empty(root: Path) -> None:
    _missing(root)
    root.mkdir()


def _flat(root: Path) -> None:
    _empty(root)
    picture(9, 9, 0).save(root / "a.png")


def _no_images(root: Path) -> None:
    _empty(root)
    (root / "class").mkdir()


UNUSABLE_FOLDERS = {
    "missing": (_missing, "photos: expected a folder of class folders, got nothing"),
    "a file": (_file, "photos: expected a folder of class folders, got a file"),
    "empty": (
        _empty,
        r"photos: expected class folders with images \(root/class/name\.jpg\), got an empty folder",
    ),
    "no class folders": (_flat, r"photos: expected class folders .*, got 1 files and no folder"),
    "no images": (_no_images, r"photos: no images in 1 class folders; looked for \.jpg"),
}


@pytest.mark.parametrize("name", UNUSABLE_FOLDERS)
def test_unusable_folders(name: str, photos: Path) -> None:
    change, message = UNUSABLE_FOLDERS[name]
    change(photos)
    config = DataConfig(root=str(photos))
    with pytest.raises(DataError, match=message):
        build_dataset(config, "train")


def test_a_class_without_images_keeps_its_label(photos: Path, caplog: pytest.LogCaptureFixture) -> None:
    (photos / "auk").mkdir()
    with caplog.at_level(logging.WARNING):
        folder = ImageFolder(photos, 16, train=False)
    assert folder.classes == ("ant", "auk", "bee", "cat")
    assert folder[8][1] == 2
    assert "class 'auk' has no images" in caplog.text


def test_held_out_share_is_disjoint_complete_and_stable(photos: Path, tmp_path: Path) -> None:
    for i in range(40):
        shutil.copy(photos / "ant" / "00.png", photos / "bee" / f"copy{i:02}.png")

    def split(root: Path, part: str) -> set[Path]:
        config = DataConfig(root=str(root), val_fraction=0.25)
        folder = build_dataset(config, part)  # type: ignore[arg-type]
        assert isinstance(folder, ImageFolder)
        return {folder.paths[i].relative_to(root) for i in range(len(folder))}

    train, val = split(photos, "train"), split(photos, "val")
    assert not train & val
    assert len(train | val) == 64
    assert 6 <= len(val) <= 28, "16 expected, standard deviation 3.5"
    moved = tmp_path / "elsewhere"
    shutil.move(photos, moved)
    shutil.copy(moved / "ant" / "00.png", moved / "ant" / "new.png")
    assert split(moved, "train") - {Path("ant/new.png")} == train
    assert split(moved, "val") - {Path("ant/new.png")} == val


def test_held_out_folder_uses_the_classes_of_training(photos: Path, tmp_path: Path) -> None:
    val = tmp_path / "val"
    shutil.copytree(photos / "cat", val / "cat")
    config = DataConfig(root=str(photos), val_root=str(val))
    folder = build_dataset(config, "val")
    assert folder.classes == ("ant", "bee", "cat")
    assert {folder[i][1] for i in range(len(folder))} == {2}
    shutil.copytree(photos / "cat", val / "dog")
    with pytest.raises(
        DataError, match=r"val: expected class folders of the training set only, got also \['dog'\]"
    ):
        build_dataset(config, "val")


UNUSABLE_CONFIGS = {
    "no root": ({}, "train", "root: expected a folder of class folders for kind image_folder, got none"),
    "no held-out": ({"root": "."}, "val", "val_root: expected it, or val_fraction, for held-out images"),
    "two held-out": ({"val_root": "a", "val_fraction": 0.1}, "val", "val_root: expected no val_fraction"),
    "kind": ({"kind": "tfrecord"}, "train", 'kind: expected "fashion_mnist", "image_folder" or "shards"'),
    "channels": ({"channels": 4}, "train", "channels: expected 1 or 3, got 4"),
    "batch_size": ({"batch_size": 0}, "train", "batch_size: expected at least 1, got 0"),
    "num_workers": ({"num_workers": -1}, "train", "num_workers: expected at least 0, got -1"),
    "split": ({"root": "."}, "test", 'split: expected "train" or "val", got \'test\''),
    "resolution": ({"kind": "fashion_mnist"}, "train", "resolution: expected 32 for fashion_mnist, got 256"),
    "val_fraction": (
        {"root": ".", "val_fraction": 1.5},
        "train",
        r"val_fraction: expected a share in \[0, 1\)",
    ),
    "bad": ({"root": ".", "max_bad_fraction": 2.0}, "train", "max_bad_fraction: expected a share in"),
}


@pytest.mark.parametrize("name", UNUSABLE_CONFIGS)
def test_unusable_configs(name: str) -> None:
    options, split, message = UNUSABLE_CONFIGS[name]
    with pytest.raises(ValueError, match=message):
        build_dataset(DataConfig(**options), split)
